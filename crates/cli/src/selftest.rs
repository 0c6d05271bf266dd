//! `tercet selftest`: does this machine compute right?

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};

use anyhow::Context;
use tercet_attention::selftest::{self, Golden, Row, Way};
use tercet_train::files;

use crate::device::{Choice, DeviceArg};
use crate::error::user;
use crate::human;

/// A golden case that is always at hand; --golden reads more of them.
const VARLEN: [&[u8]; 2] = [
    include_bytes!("../../attention/tests/data/varlen.input.safetensors"),
    include_bytes!("../../attention/tests/data/varlen.expected.safetensors"),
];

/// Check that this machine computes right: one table, every case with its worst error.
///
/// Suites: golden (stored float64 results), property (random shapes against float64, facts that
/// hold whatever the numbers are), bitwise (the same bits again, for any threads, beside anything),
/// hostile (NaN, huge and tiny numbers, inputs that lie), ops (each tensor operation, forward and
/// backward), model (small decoders: gradients, recomputation, decoding). Leaves with 1 when
/// anything fails.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    device: DeviceArg,
    /// More random cases and repeats: minutes instead of seconds
    #[arg(long)]
    long: bool,
    /// What to test
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Part::ALL, value_name = "PART,…")]
    parts: Vec<Part>,
    /// Also read golden cases, NAME.input.safetensors and NAME.expected.safetensors, from this
    /// folder
    #[arg(long, value_name = "DIR")]
    golden: Option<PathBuf>,
    /// Write the table as JSON to this file; `-` prints it instead of the table
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// A layer of the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    /// The attention operator: golden, property, bitwise and hostile suites.
    Operator,
    /// Every tensor operation.
    Ops,
    /// Small decoders.
    Model,
}

impl Part {
    const ALL: [Part; 3] = [Part::Operator, Part::Ops, Part::Model];
}

/// Runs the suites and prints the table.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let device = args.device.choose()?;
    let golden = golden(args.golden.as_deref())?;
    let only_json = args.json.as_ref().is_some_and(|path| path.as_os_str() == "-");
    let mut table = Table::new(!only_json);
    table.say(&format!("tercet {} on {device}", env!("CARGO_PKG_VERSION")));
    suites(args, &device, &golden, &mut |row| table.add(row));
    table.totals();
    if let Some(path) = &args.json {
        let json = table.json(&device.to_string())?;
        if only_json {
            println!("{}", json.trim_end());
        } else {
            files::write_atomic(path, json.as_bytes())?;
            table.say(&format!("wrote {}", path.display()));
        }
    }
    let failed = table.rows.iter().filter(|row| !row.pass).count();
    if failed > 0 {
        return Err(anyhow::anyhow!(
            "{failed} of {} cases failed: do not trust results of {device}; please report the \
             lines above with the output of `tercet doctor`",
            table.rows.len()
        ));
    }
    Ok(())
}

fn suites(args: &Args, device: &Choice, golden: &[Golden], each: &mut dyn FnMut(Row)) {
    let wanted = |part| args.parts.contains(&part);
    match device {
        _ if !wanted(Part::Operator) => {}
        Choice::Cuda(gpu) => selftest::run_cuda(gpu, golden, args.long, each),
        Choice::Cpu => {
            selftest::run(&[Way::cpu_f32(), Way::cpu_bf16()], golden, args.long, each);
            selftest::facts(&Way::reference(), each);
        }
    }
    let tensors = device.tensors();
    if wanted(Part::Ops) {
        tercet_tensor::selftest(&tensors, each);
    }
    if wanted(Part::Model) {
        tercet_model::selftest(&tensors, each);
    }
}

/// The embedded case and those of a folder.
fn golden(folder: Option<&Path>) -> anyhow::Result<Vec<Golden>> {
    let own = Golden::read("varlen", VARLEN[0], VARLEN[1]);
    let mut all = vec![own.map_err(|fault| anyhow::anyhow!("the embedded {fault}"))?];
    let Some(folder) = folder else { return Ok(all) };
    // The golden folder as a whole has the operator's cases in `nsa`.
    let inner = folder.join("nsa");
    let folder = if inner.is_dir() { inner.as_path() } else { folder };
    let entries = std::fs::read_dir(folder)
        .with_context(|| format!("cannot read the golden folder {}", folder.display()))?;
    let mut names: Vec<String> = entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter_map(|name| name.strip_suffix(".input.safetensors").map(str::to_owned))
        .collect();
    names.sort();
    if names.is_empty() {
        let place = folder.display();
        return Err(user(format!("{place} holds no golden case (NAME.input.safetensors)")));
    }
    for name in names {
        let read = |end: &str| {
            let path = folder.join(format!("{name}.{end}.safetensors"));
            std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))
        };
        let (input, expected) = (read("input")?, read("expected")?);
        let case = Golden::read(&name, &input, &expected);
        let case = case.map_err(|fault| user(format!("{}: {fault}", folder.display())))?;
        all.retain(|known| known.name != case.name);
        all.push(case);
    }
    Ok(all)
}

/// The table: shown row by row, kept for the totals and the JSON.
struct Table {
    rows: Vec<Row>,
    shown: bool,
    colours: bool,
}

/// Widest case that is shown whole.
const CASE: usize = 76;

impl Table {
    fn new(shown: bool) -> Self {
        let colours = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        Self { rows: Vec::new(), shown, colours }
    }

    fn say(&self, line: &str) {
        if self.shown {
            // A reader that has left is no reason to fail.
            let _ = writeln!(std::io::stdout(), "{line}");
        }
    }

    fn add(&mut self, row: Row) {
        if self.rows.is_empty() {
            let heads = ("suite", "case", "worst", "allowed");
            self.say(&format!("\n{:<10}{:<CASE$}{:>10}{:>10}", heads.0, heads.1, heads.2, heads.3));
        }
        self.say(&self.line(&row));
        self.rows.push(row);
    }

    fn line(&self, row: &Row) -> String {
        let Row { suite, case, worst, allowed, pass, note } = row;
        // Facts that are true or not have no error.
        let number = |x: f64| if *allowed == 0.0 { "-".into() } else { format!("{x:.1e}") };
        let verdict = match (pass, self.colours) {
            (true, false) => "pass",
            (false, false) => "FAIL",
            (true, true) => "\x1b[32mpass\x1b[0m",
            (false, true) => "\x1b[1;31mFAIL\x1b[0m",
        };
        let (worst, allowed) = (number(*worst), number(*allowed));
        let mut line = format!("{suite:<10}{case:<CASE$}{worst:>10}{allowed:>10}  {verdict}");
        if !pass {
            line.push_str(&format!("\n          {note}"));
        }
        line
    }

    fn totals(&self) {
        let mut suites: Vec<&str> = Vec::new();
        for row in &self.rows {
            if !suites.contains(&row.suite) {
                suites.push(row.suite);
            }
        }
        let count = |suite: &str| {
            let of = || self.rows.iter().filter(|row| row.suite == suite);
            format!("{suite} {} of {}", of().filter(|row| row.pass).count(), of().count())
        };
        let parts: Vec<String> = suites.into_iter().map(count).collect();
        let passed = self.rows.iter().filter(|row| row.pass).count();
        self.say(&format!(
            "\n{} of {} passed: {}",
            human::grouped(passed as u64),
            human::grouped(self.rows.len() as u64),
            parts.join(", ")
        ));
    }

    fn json(&self, device: &str) -> anyhow::Result<String> {
        let passed = self.rows.iter().filter(|row| row.pass).count();
        let json = serde_json::json!({
            "version": env!("CARGO_PKG_VERSION"),
            "device": device,
            "threads": rayon::current_num_threads(),
            "cases": self.rows.len(),
            "passed": passed,
            "rows": self.rows,
        });
        Ok(serde_json::to_string_pretty(&json)? + "\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(pass: bool) -> Row {
        let (case, note) = ("varlen · cpu f32".into(), "d_q is off".into());
        Row { suite: "golden", case, worst: 1e-7, allowed: 2e-7, pass, note }
    }

    #[test]
    fn a_line_says_what_failed_and_colours_are_for_terminals() {
        let mut table = Table { rows: Vec::new(), shown: false, colours: false };
        let line = table.line(&row(true));
        assert!(line.contains("1.0e-7") && line.ends_with("pass"), "{line}");
        assert!(table.line(&row(false)).contains("FAIL\n          d_q is off"));
        assert!(table.line(&Row { worst: 0.0, allowed: 0.0, ..row(true) }).contains("- "));
        table.colours = true;
        assert!(table.line(&row(true)).contains("\x1b[32mpass"));
    }

    #[test]
    fn a_number_that_json_has_not_is_null() {
        let mut table = Table { rows: Vec::new(), shown: false, colours: false };
        table.add(Row { worst: f64::INFINITY, ..row(false) });
        let json: serde_json::Value = serde_json::from_str(&table.json("cpu").unwrap()).unwrap();
        assert!(json["rows"][0]["worst"].is_null() && json["passed"] == 0);
    }
}
