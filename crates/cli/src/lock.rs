//! What this binary was built from: the packages of the embedded Cargo.lock.

/// The lock file this binary was built with.
pub const CARGO_LOCK: &str = include_str!("../../../Cargo.lock");

/// One package of the lock file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Package<'a> {
    /// Crate name.
    pub name: &'a str,
    /// Exact version.
    pub version: &'a str,
    /// Whether it comes from a registry (path dependencies do not).
    pub registry: bool,
}

/// All packages, in the file's (sorted) order.
pub fn packages(lock: &str) -> Vec<Package<'_>> {
    lock.split("[[package]]")
        .skip(1)
        .filter_map(|entry| {
            let name = field(entry, "name")?;
            let version = field(entry, "version")?;
            Some(Package { name, version, registry: field(entry, "source").is_some() })
        })
        .collect()
}

/// The version of one package, if it is in the lock file.
pub fn version(name: &str) -> Option<&'static str> {
    packages(CARGO_LOCK).into_iter().find(|p| p.name == name).map(|p| p.version)
}

fn field<'a>(entry: &'a str, key: &str) -> Option<&'a str> {
    entry.lines().find_map(|line| {
        let value = line.strip_prefix(key)?.trim_start().strip_prefix('=')?;
        Some(value.trim().trim_matches('"'))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_embedded_lock_names_our_crates_and_the_registrys() {
        let all = packages(CARGO_LOCK);
        assert!(all.iter().any(|p| p.name == "tercet-cli" && !p.registry));
        assert!(all.iter().any(|p| p.name == "rayon" && p.registry));
        assert!(all.is_sorted_by_key(|p| p.name));
        assert!(version("gemm").is_some_and(|v| v.starts_with("0.")));
        assert_eq!(version("no-such-crate"), None);
    }
}
