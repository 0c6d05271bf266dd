//! `tercet private`: what training with noise gives away, and how much noise it needs.

mod audit;
mod epsilon;
mod records;
mod sigma;

/// Say what training with noise gives away, or how much noise it needs.
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
}

/// Runs the chosen question.
pub fn run(args: &Args) -> anyhow::Result<()> {
    match &args.what {
        What::Audit(args) => audit::run(args),
        What::Epsilon(args) => epsilon::run(args),
        What::Records(args) => records::run(args),
        What::Sigma(args) => sigma::run(args),
    }
}

/// An expected batch over a number of people, such as `256/60000`, or a number.
fn parse_rate(text: &str) -> Result<f64, String> {
    let number = |text: &str| text.trim().parse::<f64>().ok();
    let rate = match text.split_once('/') {
        Some((batch, people)) => number(batch).zip(number(people)).map(|(b, n)| b / n),
        None => number(text),
    };
    rate.ok_or_else(|| format!("`{text}` is not a rate; write a number such as 0.004 or 256/60000"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_a_number_or_a_fraction() {
        assert_eq!(parse_rate("0.01"), Ok(0.01));
        assert_eq!(parse_rate("256/60000"), Ok(256.0 / 60000.0));
        assert!(
            parse_rate("1/2/3").is_err() && parse_rate("").is_err() && parse_rate("x").is_err()
        );
        // What the number means is for the accountant to judge.
        assert!(parse_rate("1/0").is_ok_and(f64::is_infinite));
    }
}
