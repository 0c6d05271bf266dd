//! `tercet plan` of a private run: what it will promise, before anything starts.

use std::fmt::Write;
use std::path::Path;

use tercet_private::method::Method;
use tercet_private::tune::{Budget, PrivateConfig, run};

/// Whether a run file, or an override of it, has a section `[private]`.
pub fn is_private(config: &Path, overrides: &[String]) -> bool {
    // What cannot be read is for the plan of other runs to complain of.
    let text = std::fs::read_to_string(config).unwrap_or_default();
    let table = text.parse::<toml::Table>().unwrap_or_default();
    table.contains_key("private") || overrides.iter().any(|text| text.starts_with("private."))
}

/// Prints the promise.
pub fn print(config: &Path, overrides: &[String]) -> anyhow::Result<()> {
    let config = PrivateConfig::load(config, overrides)?;
    // Of a model that is not there yet nothing can be said.
    if let (Some(lora), true) = (&config.lora, config.model.path.join("config.json").exists()) {
        lora.check_for(&tercet_model::load_config(&config.model.path)?.0)?;
    }
    print!("{}", text(&config)?);
    Ok(())
}

fn text(config: &PrivateConfig) -> anyhow::Result<String> {
    let budget = Budget::plan(config)?;
    let mut out = String::new();
    for (name, text) in budget.lines(config) {
        let _ = writeln!(out, "{name:<12}{text}");
    }
    // Of a count for each adapter the price is known when the model is.
    let counts = config.private.method == Method::Quantile && config.private.by_adapter();
    if !counts && let Some(price) = run::price(&run::statistics(config, &budget, 1)?) {
        let _ = writeln!(out, "{:<12}{price}", "price");
    }
    let rows = config.rows()?;
    let _ = writeln!(
        out,
        "{:<12}portions of {rows} tokens and at most {}, all filled up to the same size",
        "memory",
        match config.private.micro_people {
            Some(people) => format!("{people} persons"),
            None => "1 GiB of persons' gradients".into(),
        }
    );
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_example_is_planned_with_what_it_promises() {
        let config = include_str!("../../../../configs/private.toml");
        let config = PrivateConfig::parse(config, &[]).unwrap();
        let text = text(&config).unwrap();
        for part in [
            "epsilon at most 4",
            "delta",
            "sigma 0.",
            "steps",
            "at most 8 rows",
            "mode m1",
            "% more noise",
        ] {
            assert!(text.contains(part), "{part} is missing from\n{text}");
        }
        assert!(!text.contains("WARNING"), "{text}");
    }
}
