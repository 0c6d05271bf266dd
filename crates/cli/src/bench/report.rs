//! The benchmark's table, JSON and chart.

use tercet_attention::{Dims, NsaSpec};

use super::operator::Measured;
use crate::svg::{Axes, Line, Panel};
use crate::{human, svg};

/// Everything that identifies a run of the benchmark.
#[derive(serde::Serialize)]
pub struct Setting {
    /// Version of this program.
    pub version: &'static str,
    /// Processor.
    pub cpu: String,
    /// Where it was computed, as --device takes it.
    pub device: String,
    /// Kernels that run-time dispatch chose.
    pub kernels: &'static str,
    /// Threads.
    pub threads: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Key dimension.
    pub key_dim: usize,
    /// Value dimension.
    pub value_dim: usize,
    /// Storage type.
    pub dtype: &'static str,
    /// Spec of the sparse operator.
    pub spec: NsaSpec,
    /// Where the spec was read from, if not the default.
    pub spec_file: Option<String>,
    /// Seed of the inputs.
    pub seed: u64,
    /// GFLOP/s of the `gemm` yardstick in this run.
    pub gemm_gflops: f64,
}

impl Setting {
    /// Heads and dimensions.
    pub fn dims(&self) -> Dims {
        let Self { heads, kv_heads, key_dim, value_dim, .. } = *self;
        Dims { heads, kv_heads, key_dim, value_dim }
    }

    /// GFLOP/s of a row.
    pub fn rate(&self, m: &Measured) -> f64 {
        m.flops / m.seconds / 1e9
    }

    /// Rate as a share of the yardstick.
    pub fn share(&self, m: &Measured) -> f64 {
        self.rate(m) / self.gemm_gflops
    }

    /// The command that repeats one row.
    pub fn command(&self, m: &Measured) -> String {
        let Self { heads, kv_heads, key_dim, value_dim, dtype, seed, threads, device, .. } = self;
        let length = human::length(m.tokens);
        let spec = self.spec_file.as_ref().map(|f| format!(" --spec {f}")).unwrap_or_default();
        format!(
            "tercet bench attention --rows {} --lengths {length} --heads {heads} \
             --kv-heads {kv_heads} --dim {key_dim} --value-dim {value_dim} --dtype {dtype} \
             --seed {seed}{spec} --device {device} --threads {threads}",
            m.row
        )
    }

    /// One line of the table.
    pub fn line(&self, m: &Measured) -> String {
        let peak = m.peak_bytes.map_or_else(|| "?".into(), human::bytes);
        let (rate, share) = match m.of_branch {
            Some(share) => ("-".into(), format!("{share:.2}× cmp")),
            None => (format!("{:.1}", self.rate(m)), format!("{:.0} %", 100.0 * self.share(m))),
        };
        format!(
            "{:<21}{:>7}{:>11}{rate:>9}{share:>11}{peak:>13}  {}",
            m.row,
            human::length(m.tokens),
            human::seconds(m.seconds),
            self.command(m)
        )
    }

    /// What was measured, as JSON: the setting, and each row with its rate and command.
    pub fn json(&self, rows: &[Measured]) -> anyhow::Result<String> {
        let rows = rows.iter().map(|m| {
            let mut row = serde_json::to_value(m)?;
            row["gflops"] = self.rate(m).into();
            row["share_of_gemm"] = self.share(m).into();
            row["command"] = self.command(m).into();
            Ok(row)
        });
        let rows: Vec<serde_json::Value> = rows.collect::<Result<_, serde_json::Error>>()?;
        let all = serde_json::json!({ "setting": self, "rows": rows });
        Ok(serde_json::to_string_pretty(&all)? + "\n")
    }

    /// Time against length, sparse and dense, as SVG.
    pub fn svg(&self, rows: &[Measured]) -> String {
        let line = |row: &str, name, subject| {
            let some = rows.iter().filter(|m| m.row == row);
            let points = some.map(|m| (m.tokens as f64, m.seconds)).collect();
            Line { name, subject, points }
        };
        let phases =
            [("forward", "Forward"), ("backward", "Backward"), ("decode", "One decode step")];
        let panels: Vec<Panel> = phases
            .iter()
            .map(|(phase, title)| Panel {
                title,
                lines: vec![
                    line(&format!("{phase}/dense"), "dense", false),
                    line(&format!("{phase}/nsa"), "NSA", true),
                ],
            })
            .collect();
        let Self { heads, kv_heads, key_dim, value_dim, dtype, threads, cpu, .. } = self;
        let note = format!(
            "{heads} query heads, {kv_heads} key/value, dims {key_dim}/{value_dim}, {dtype}, \
             {}",
            match self.device.as_str() {
                "cpu" => format!("{threads} threads of {cpu}, {} kernels", self.kernels),
                _ => cpu.clone(),
            }
        );
        let axes = Axes { x: |t| human::length(t as usize), y: power, x_title: "tokens" };
        svg::panels("Native sparse attention against dense attention", &note, &axes, &panels)
    }
}

/// A power of ten seconds, without digits it does not have.
fn power(seconds: f64) -> String {
    let (scale, unit) = match seconds {
        s if s < 0.9e-6 => (1e9, "ns"),
        s if s < 0.9e-3 => (1e6, "µs"),
        s if s < 0.9 => (1e3, "ms"),
        _ => (1.0, "s"),
    };
    format!("{:.0} {unit}", seconds * scale)
}

/// The table's heading, aligned with [`Setting::line`].
pub fn heading() -> String {
    format!(
        "{:<21}{:>7}{:>11}{:>9}{:>11}{:>13}  {}",
        "row", "tokens", "median", "GFLOP/s", "of gemm", "peak memory", "repeat with"
    )
}

/// Dense over sparse time, per phase and length, as a small table; none when no row has its
/// counterpart.
pub fn speedups(rows: &[Measured]) -> Option<String> {
    use std::fmt::Write;
    let mut lengths: Vec<usize> = rows.iter().map(|m| m.tokens).collect();
    lengths.sort_unstable();
    lengths.dedup();
    let time =
        |row: &str, t| rows.iter().find(|m| m.row == row && m.tokens == t).map(|m| m.seconds);
    let mut pairs = 0;
    let mut out = format!("{:>8}", "tokens");
    let phases = ["forward", "backward", "decode"];
    for phase in phases {
        let _ = write!(out, "  |{:>9}{:>10}{:>10}", "dense", "NSA", phase);
    }
    out.push('\n');
    for t in lengths {
        let _ = write!(out, "{:>8}", human::length(t));
        for phase in phases {
            let dense = time(&format!("{phase}/dense"), t);
            let nsa = time(&format!("{phase}/nsa"), t);
            let _ = match (dense, nsa) {
                (Some(d), Some(n)) => {
                    pairs += 1;
                    let (dense, nsa) = (human::seconds(d), human::seconds(n));
                    write!(out, "  |{dense:>9}{nsa:>10}{:>9.2}×", d / n)
                }
                _ => write!(out, "  |{:>9}{:>10}{:>10}", "-", "-", "-"),
            };
        }
        out.push('\n');
    }
    (pairs > 0).then_some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(row: &'static str, tokens: usize, seconds: f64) -> Measured {
        Measured {
            row,
            tokens,
            seconds,
            runs: 3,
            flops: 1e9,
            of_branch: None,
            peak_bytes: Some(1 << 20),
        }
    }

    fn setting() -> Setting {
        Setting {
            version: "0",
            cpu: "CPU".into(),
            device: "cpu".into(),
            kernels: "portable",
            threads: 2,
            heads: 16,
            kv_heads: 1,
            key_dim: 64,
            value_dim: 64,
            dtype: "f32",
            spec: NsaSpec::default(),
            spec_file: None,
            seed: 0,
            gemm_gflops: 100.0,
        }
    }

    #[test]
    fn each_row_prints_the_command_that_repeats_it() {
        let line = setting().line(&row("forward/slc", 8192, 0.02));
        assert!(line.contains("50.0"), "{line}");
        assert!(line.contains("50 %"), "{line}");
        assert!(line.ends_with(
            "tercet bench attention --rows forward/slc --lengths 8k --heads 16 --kv-heads 1 \
             --dim 64 --value-dim 64 --dtype f32 --seed 0 --device cpu --threads 2"
        ));
    }

    #[test]
    fn speedups_are_dense_over_sparse() {
        let rows = [row("forward/dense", 1024, 0.3), row("forward/nsa", 1024, 0.2)];
        assert!(speedups(&rows).unwrap().contains("1.50×"));
        assert!(speedups(&rows[..1]).is_none());
        let json: serde_json::Value =
            serde_json::from_str(&setting().json(&rows).unwrap()).unwrap();
        assert_eq!(json["rows"][0]["share_of_gemm"], 1.0 / 0.3 / 100.0);
        assert!(setting().svg(&rows).contains("NSA"));
    }
}
