//! `tercet private records`: text about people who do not exist.

use std::fmt::Write;
use std::path::PathBuf;

use serde::Serialize;
use tercet_private::clinic::{self, Counts, Plan, Statistics};

use crate::human;

/// Make pseudo-clinical records to try private training on.
///
/// Patients like those of a diabetes ward, with one stay in hospital or several, as text; all of it
/// invented from the seed, none of it medicine. The folder gets train.jsonl (nine patients of ten),
/// heldout.jsonl (the tenth, nobody of train), public.jsonl (others, from another population) and
/// canaries.jsonl: every canary, the coin that decided whether it was planted, and its line in
/// train.jsonl. Rows are {"person": …, "text": …}.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    tercet private records --patients 43000 --canaries 1000 --output records\n  \
    tercet private records --patients 500 --seed 7 --output small")]
pub struct Args {
    /// Patients of train and held-out together; each has some two stays
    #[arg(long, value_name = "N")]
    patients: u64,
    /// Canaries that get a coin each; about half are planted
    #[arg(long, value_name = "M", default_value_t = 0)]
    canaries: usize,
    /// All follows from it
    #[arg(long, value_name = "S", default_value_t = 0)]
    seed: u64,
    /// The folder to make; it must not exist
    #[arg(long, short, value_name = "FOLDER")]
    output: PathBuf,
    /// Write JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    #[serde(flatten)]
    plan: Plan,
    #[serde(flatten)]
    statistics: Statistics,
}

/// Makes them and says what they are.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let plan = Plan { patients: args.patients, canaries: args.canaries, seed: args.seed };
    let statistics = clinic::write(&plan, &args.output)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&Report { plan, statistics })?);
    } else {
        print!("{}", text(&statistics));
    }
    Ok(())
}

fn text(made: &Statistics) -> String {
    let mut out = format!(
        "{:<16}{:>10}{:>12}{:>14}{:>22}\n",
        "file", "persons", "encounters", "words", "most of one person"
    );
    let files = [
        ("train.jsonl", made.train),
        ("heldout.jsonl", made.heldout),
        ("public.jsonl", made.public),
    ];
    for (name, Counts { persons, encounters, words, most_encounters }) in files {
        let [persons, encounters, words] = [persons, encounters, words].map(human::grouped);
        let _ = writeln!(
            out,
            "{name:<16}{persons:>10}{encounters:>12}{words:>14}{most_encounters:>22}"
        );
    }
    let _ = writeln!(
        out,
        "\n{} of {} canaries are in train.jsonl; canaries.jsonl says which and where.",
        human::grouped(made.planted),
        human::grouped(made.canaries)
    );
    out
}
