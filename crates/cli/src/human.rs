//! Numbers as people read and write them.

use std::time::Duration;

/// Parses a count such as `4096`, `8k` (×1024) or `1m` (×1024²).
pub fn parse_length(text: &str) -> Result<usize, String> {
    let lower = text.trim().to_ascii_lowercase();
    let (digits, unit) = match lower.as_bytes().last() {
        Some(b'k') => (&lower[..lower.len() - 1], 1 << 10),
        Some(b'm') => (&lower[..lower.len() - 1], 1 << 20),
        _ => (lower.as_str(), 1),
    };
    let fail = || format!("`{text}` is not a length; write a number such as 4096, 8k or 1m");
    let count: usize = digits.parse().map_err(|_| fail())?;
    match count.checked_mul(unit) {
        Some(n) if n > 0 => Ok(n),
        _ => Err(fail()),
    }
}

/// `8k` for 8192, `1000` for 1000: the inverse of [`parse_length`].
pub fn length(n: usize) -> String {
    match n {
        n if n >= 1 << 20 && n.is_multiple_of(1 << 20) => format!("{}m", n >> 20),
        n if n >= 1 << 10 && n.is_multiple_of(1 << 10) => format!("{}k", n >> 10),
        n => n.to_string(),
    }
}

/// How this program was called, so that the commands it suggests work where they are read:
/// `target/release/tercet` under cargo, `tercet` when installed.
pub fn program() -> String {
    std::env::args().next().unwrap_or_else(|| "tercet".into())
}

/// `1,234,567`.
pub fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(c);
    }
    out
}

/// Bytes in binary units: `23.4 GiB`.
pub fn bytes(n: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = n as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{n} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

/// A duration to three significant digits: `840 ns`, `1.53 ms`, `12.4 s`.
pub fn seconds(s: f64) -> String {
    let (value, unit) = match s {
        s if s < 1e-6 => (s * 1e9, "ns"),
        s if s < 1e-3 => (s * 1e6, "µs"),
        s if s < 1.0 => (s * 1e3, "ms"),
        s => (s, "s"),
    };
    let digits = if value >= 100.0 {
        0
    } else if value >= 10.0 {
        1
    } else {
        2
    };
    format!("{value:.digits$} {unit}")
}

/// A waiting time: `42s`, `3m05s`, `2h07m`, `3d04h`.
pub fn duration(d: Duration) -> String {
    let s = d.as_secs();
    match s {
        0..60 => format!("{s}s"),
        60..3600 => format!("{}m{:02}s", s / 60, s % 60),
        3600..86_400 => format!("{}h{:02}m", s / 3600, s % 3600 / 60),
        _ => format!("{}d{:02}h", s / 86_400, s % 86_400 / 3600),
    }
}

/// A large count with a decimal unit: `3.42M`, `27.1B`.
pub fn count(n: f64) -> String {
    for (unit, name) in [(1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")] {
        if n >= unit {
            return format!("{:.2}{name}", n / unit);
        }
    }
    format!("{n:.0}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_read_back_as_written() {
        for n in [1, 1000, 1024, 8192, 1 << 20, 3 << 20] {
            assert_eq!(parse_length(&length(n)), Ok(n));
        }
        for bad in ["", "k", "0", "-1", "8q", "99999999999999999999", "18014398509481984k"] {
            assert!(parse_length(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn numbers_are_grouped_and_rounded_for_reading() {
        assert_eq!(grouped(1_234_567), "1,234,567");
        assert_eq!(grouped(12), "12");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(seconds(0.001_534), "1.53 ms");
        assert_eq!(duration(Duration::from_secs(185)), "3m05s");
        assert_eq!(count(3_420_000.0), "3.42M");
    }
}
