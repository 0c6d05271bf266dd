//! The documents say what is so: drift fails here.

use std::path::{Path, PathBuf};
use std::process::Command;

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn read(name: &str) -> String {
    let path = repository().join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Names of the workspace's dependencies that are not our own crates.
fn dependencies() -> Vec<String> {
    let manifest: toml::Table = read("Cargo.toml").parse().unwrap();
    let table = manifest["workspace"]["dependencies"].as_table().unwrap();
    // The Python module is a workspace of its own.
    let python: toml::Table = read("python/Cargo.toml").parse().unwrap();
    let python = python["dependencies"].as_table().unwrap();
    let all = table.keys().chain(python.keys());
    all.filter(|name| !name.starts_with("tercet-")).cloned().collect()
}

/// Names in back quotes in the first column of the dependency table.
fn explained() -> Vec<String> {
    let text = read("ARCHITECTURE.md");
    let (_, section) = text.split_once("## Dependencies and their reasons").unwrap();
    let rows = section.lines().filter(|line| line.starts_with("| `"));
    rows.flat_map(|row| {
        let cell = row.split('|').nth(1).unwrap();
        cell.split('`').skip(1).step_by(2).map(str::to_owned).collect::<Vec<_>>()
    })
    .collect()
}

#[test]
fn every_dependency_has_its_reason_and_every_reason_its_dependency() {
    let (used, explained) = (dependencies(), explained());
    for name in &used {
        assert!(explained.contains(name), "ARCHITECTURE.md gives no reason for `{name}`");
    }
    for name in &explained {
        assert!(used.contains(name), "ARCHITECTURE.md explains `{name}`, which is not used");
    }
}

#[test]
fn every_path_that_the_architecture_names_exists() {
    let text = read("ARCHITECTURE.md");
    let mut seen = 0;
    for word in text.split('`').skip(1).step_by(2) {
        let inside = ["crates/", "configs/", "docs/", "bench/", ".ci/"];
        if inside.iter().any(|root| word.starts_with(root)) && !word.contains("VERB") {
            seen += 1;
            assert!(repository().join(word).exists(), "{word} is named but does not exist");
        }
    }
    assert!(seen > 10, "only {seen} paths were found: is the test still reading the table?");
}

#[test]
fn the_readme_names_every_verb_and_links_only_to_files_that_exist() {
    let readme = read("README.md");
    let help = Command::new(env!("CARGO_BIN_EXE_tercet")).arg("--help").output().unwrap();
    let help = String::from_utf8(help.stdout).unwrap();
    let (_, list) = help.split_once("Commands:\n").unwrap();
    let list = list.split("\n\n").next().unwrap();
    let verbs: Vec<&str> = list
        .lines()
        .filter(|line| line.starts_with("  ") && !line.starts_with("   "))
        .filter_map(|line| line.split_whitespace().next())
        .filter(|verb| *verb != "help")
        .collect();
    assert!(verbs.len() >= 9, "{verbs:?}");
    for verb in verbs {
        assert!(readme.contains(&format!("`tercet {verb}")), "README.md does not name `{verb}`");
    }
    for link in readme.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
        if !link.starts_with("http") {
            assert!(repository().join(link).exists(), "README.md links to {link}");
        }
    }
}
