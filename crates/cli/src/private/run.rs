//! What a run of noisy steps is, for the questions about it.

/// Rate, steps and δ: flags that several questions share.
#[derive(clap::Args)]
pub struct Run {
    /// Probability with which a step draws each person: a number or BATCH/PEOPLE
    #[arg(long, value_name = "Q", value_parser = parse_rate)]
    pub rate: f64,
    /// Number of steps
    #[arg(long, value_name = "T")]
    pub steps: u64,
    /// Probability with which epsilon may be passed; well below one over the number of people
    #[arg(long, value_name = "D")]
    pub delta: f64,
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
