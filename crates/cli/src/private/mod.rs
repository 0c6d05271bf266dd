//! `tercet private`: training with noise, what it gives away, and how much noise it needs.

mod audit;
mod epsilon;
pub mod plan;
mod records;
mod run;
mod sigma;
mod tune;

/// Tune with a proof of privacy, or say what training with noise gives away and needs.
///
/// For the Gaussian mechanism on Poisson samples (DP-SGD): every step draws each person with
/// probability RATE, clips, and adds noise of SIGMA times the clipping norm. Adjacency is adding or
/// removing one person. A shuffled loader or batches of fixed size are not covered.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand)]
enum What {
    Audit(audit::Args),
    Epsilon(epsilon::Args),
    Records(records::Args),
    Sigma(sigma::Args),
    Tune(Box<tune::Args>),
}

impl Args {
    /// Whether a closed output pipe must not end it.
    pub fn has_something_to_save(&self) -> bool {
        matches!(self.what, What::Tune(_))
    }
}

/// Runs the chosen question.
pub fn run(args: &Args) -> anyhow::Result<()> {
    match &args.what {
        What::Audit(args) => audit::run(args),
        What::Epsilon(args) => epsilon::run(args),
        What::Records(args) => records::run(args),
        What::Sigma(args) => sigma::run(args),
        What::Tune(args) => tune::run(args),
    }
}
