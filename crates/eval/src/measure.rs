//! From likelihoods and texts to numbers, as lm-eval defines them.

use crate::item::{Item, Target};
use crate::score::Likelihood;
use crate::task::{Metric, Output};

/// What a model answered to a question.
#[derive(Clone, Debug, PartialEq)]
pub enum Answer {
    /// Of each continuation.
    Likelihoods(Vec<Likelihood>),
    /// What it wrote.
    Text(String),
}

/// The mean of a metric over all rows, or what is made of it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Score {
    /// What was measured.
    pub metric: Metric,
    /// Its value.
    pub value: f64,
    /// Its standard error; none of a single row.
    pub stderr: Option<f64>,
}

/// One row's value of a metric; of [`Metric::Perplexity`] the log-likelihood, in nats.
pub(crate) fn value(metric: Metric, output: Output, item: &Item, answer: &Answer) -> f64 {
    let hit = match (answer, &item.target) {
        (Answer::Likelihoods(all), _) if metric == Metric::Perplexity => {
            return all.first().map_or(0.0, |own| own.log_prob);
        }
        (Answer::Likelihoods(all), _) if output == Output::Loglikelihood => {
            all.first().is_some_and(|own| own.greedy)
        }
        (Answer::Likelihoods(all), Target::Choices(right)) => {
            let best = |length: fn(&str) -> usize| {
                let each = all.iter().zip(&item.choices);
                first_best(each.map(|(own, choice)| own.log_prob / length(choice) as f64))
            };
            match metric {
                Metric::AccNorm => right.contains(&best(|choice| choice.chars().count())),
                Metric::AccBytes => right.contains(&best(str::len)),
                Metric::ExactMatch { .. } => right.iter().any(|&at| all[at].greedy),
                _ => right.contains(&best(|_| 1)),
            }
        }
        (Answer::Text(text), Target::Texts(wanted)) => {
            let text = bare(metric, text);
            wanted.iter().any(|wanted| bare(metric, wanted) == text)
        }
        _ => false,
    };
    f64::from(u8::from(hit))
}

/// A metric of all rows, and the error of it: the sample standard deviation over √n. That of a
/// perplexity is the error of the mean log-likelihood times the perplexity (the delta method);
/// lm-eval draws resamples for it.
pub(crate) fn score(metric: Metric, values: &[f64]) -> Score {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let squares: f64 = values.iter().map(|x| (x - mean) * (x - mean)).sum();
    let error = (values.len() > 1).then(|| (squares / (n - 1.0)).sqrt() / n.sqrt());
    if metric == Metric::Perplexity {
        let value = (-mean).exp();
        return Score { metric, value, stderr: error.map(|error| value * error) };
    }
    Score { metric, value: mean, stderr: error }
}

/// The place of the highest number, the first of equals.
fn first_best(numbers: impl Iterator<Item = f64>) -> usize {
    let mut best = (0, f64::NEG_INFINITY);
    for (at, number) in numbers.enumerate() {
        if number > best.1 {
            best = (at, number);
        }
    }
    best.0
}

/// A text without what an exact match does not look at.
fn bare(metric: Metric, text: &str) -> String {
    let Metric::ExactMatch { ignore_case, ignore_punctuation, ignore_numbers } = metric else {
        return text.to_owned();
    };
    let text = if ignore_case { text.to_lowercase() } else { text.to_owned() };
    let drop = |c: &char| {
        (ignore_punctuation && c.is_ascii_punctuation()) || (ignore_numbers && c.is_ascii_digit())
    };
    text.chars().filter(|c| !drop(c)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(choices: &[&str], right: &[usize]) -> Item {
        Item {
            row: 0,
            context: "c".into(),
            choices: choices.iter().map(|c| c.to_string()).collect(),
            target: Target::Choices(right.to_vec()),
        }
    }

    fn answer(log_probs: &[f64], greedy: &[bool]) -> Answer {
        let each = log_probs.iter().zip(greedy);
        Answer::Likelihoods(
            each.map(|(&log_prob, &greedy)| Likelihood { log_prob, greedy }).collect(),
        )
    }

    #[test]
    fn a_choice_is_judged_by_sum_by_characters_and_by_bytes() {
        // Per character: -4, -1.5, -1.6; per byte: -4, -1.5, -0.8.
        let item = item(&["a", "bb", "éé"], &[2]);
        let answer = answer(&[-4.0, -3.0, -3.2], &[false, false, true]);
        let of = |metric| value(metric, Output::MultipleChoice, &item, &answer);
        assert_eq!([of(Metric::Acc), of(Metric::AccNorm), of(Metric::AccBytes)], [0.0, 0.0, 1.0]);
        let exact = Metric::ExactMatch {
            ignore_case: false,
            ignore_punctuation: false,
            ignore_numbers: false,
        };
        assert_eq!(of(exact), 1.0);
    }

    #[test]
    fn of_equal_choices_the_first_counts() {
        let answer = answer(&[-2.0, -2.0], &[false, false]);
        for (right, wanted) in [(&[0][..], 1.0), (&[1], 0.0), (&[1, 0], 1.0)] {
            let item = item(&["x", "x"], right);
            assert_eq!(value(Metric::Acc, Output::MultipleChoice, &item, &answer), wanted);
        }
    }

    #[test]
    fn texts_are_compared_after_what_is_ignored_is_gone() {
        let item = Item {
            row: 0,
            context: "c".into(),
            choices: vec![],
            target: Target::Texts(vec!["no".into(), "Yes, 1!".into()]),
        };
        let of = |ignore: bool, text: &str| {
            let metric = Metric::ExactMatch {
                ignore_case: ignore,
                ignore_punctuation: ignore,
                ignore_numbers: ignore,
            };
            value(metric, Output::GenerateUntil, &item, &Answer::Text(text.into()))
        };
        assert_eq!([of(false, "yes "), of(true, "yes 22?"), of(false, "no")], [0.0, 1.0, 1.0]);
    }

    #[test]
    fn errors_are_the_sample_deviation_over_the_root_of_the_count() {
        // Of 1, 0, 0, 1, 1: mean 0.6, squares 1.2, 1.2 / 4 = 0.3, √(0.3 / 5) = 0.244948974278….
        let score = score(Metric::Acc, &[1.0, 0.0, 0.0, 1.0, 1.0]);
        assert_eq!(score.value, 0.6);
        assert!((score.stderr.unwrap() - 0.244_948_974_278_317_8).abs() < 1e-15);
        assert_eq!(super::score(Metric::Acc, &[1.0]).stderr, None);
        // exp(2) of a mean of -2; its error is exp(2) · √(2 / 1) / √2 = exp(2).
        let score = super::score(Metric::Perplexity, &[-1.0, -3.0]);
        assert!((score.value - 2f64.exp()).abs() < 1e-14);
        assert!((score.stderr.unwrap() - 2f64.exp()).abs() < 1e-14);
    }
}
