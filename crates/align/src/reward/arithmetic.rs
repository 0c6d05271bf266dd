//! Numbers in text, and the value of a simple expression: numbers, `+ - * /`, parentheses.

use super::error::excerpt;

/// Deepest nesting of parentheses and signs.
const DEEPEST: usize = 100;

/// The last number a text names, if any: `1,234.5`, `-3`, `.5` and `2e-3` are numbers. A minus
/// counts as a sign only at the number's own side and not after a letter, a digit or `)`; commas
/// only between groups of three digits.
pub(super) fn last_number(text: &str) -> Option<f64> {
    let bytes = text.as_bytes();
    let (mut at, mut last) = (0, None);
    while at < bytes.len() {
        // The fraction of a version such as 1.2.3 is no number of its own.
        let inside = at > 0 && bytes[at] == b'.' && bytes[at - 1].is_ascii_digit();
        match number(&bytes[at..]) {
            Some((value, length)) if !inside => {
                last = Some(if negative(&text[..at]) { -value } else { value });
                at += length;
            }
            _ => at += 1,
        }
    }
    last
}

/// Whether what stands before a number makes it negative.
fn negative(before: &str) -> bool {
    let Some(rest) = before.strip_suffix(['-', '\u{2212}']) else { return false };
    !rest.ends_with(|c: char| c.is_alphanumeric() || c == ')')
}

/// The number that `bytes` begins with, without a sign, and its length; infinite when too large.
fn number(bytes: &[u8]) -> Option<(f64, usize)> {
    let digits = |from: usize| {
        let rest = bytes.get(from..).unwrap_or_default();
        rest.iter().take_while(|b| b.is_ascii_digit()).count()
    };
    let mut end = digits(0);
    if (1..=3).contains(&end) {
        while bytes.get(end) == Some(&b',') && digits(end + 1) == 3 {
            end += 4;
        }
    }
    if bytes.get(end) == Some(&b'.') {
        let fraction = digits(end + 1);
        end += if fraction > 0 { 1 + fraction } else { 0 };
    }
    if end == 0 {
        return None;
    }
    if matches!(bytes.get(end), Some(b'e' | b'E')) {
        let sign = usize::from(matches!(bytes.get(end + 1), Some(b'+' | b'-')));
        let exponent = digits(end + 1 + sign);
        end += if exponent > 0 { 1 + sign + exponent } else { 0 };
    }
    let plain: String =
        bytes[..end].iter().filter(|b| **b != b',').map(|&b| char::from(b)).collect();
    Some((plain.parse().ok()?, end))
}

/// The value of an expression, or what is wrong with it.
pub(super) fn evaluate(text: &str) -> Result<f64, String> {
    let mut parser = Parser { bytes: text.as_bytes(), at: 0, depth: 0 };
    let value = parser.sum().and_then(|value| match parser.next() {
        Some(_) => Err(parser.expected("an operator or its end")),
        None if !value.is_finite() => {
            Err("has no finite value (does it divide by zero?)".to_owned())
        }
        None => Ok(value),
    });
    value.map_err(|problem| format!("\"{}\" {problem}", excerpt(text)))
}

struct Parser<'a> {
    bytes: &'a [u8],
    at: usize,
    depth: usize,
}

impl Parser<'_> {
    /// The next byte that is not white space; it is not taken.
    fn next(&mut self) -> Option<u8> {
        while self.bytes.get(self.at).is_some_and(u8::is_ascii_whitespace) {
            self.at += 1;
        }
        self.bytes.get(self.at).copied()
    }

    fn expected(&self, what: &str) -> String {
        format!("is not a simple expression: expected {what} after its first {} bytes", self.at)
    }

    fn sum(&mut self) -> Result<f64, String> {
        let mut value = self.product()?;
        while let Some(operator @ (b'+' | b'-')) = self.next() {
            self.at += 1;
            let right = self.product()?;
            value = if operator == b'+' { value + right } else { value - right };
        }
        Ok(value)
    }

    fn product(&mut self) -> Result<f64, String> {
        let mut value = self.factor()?;
        while let Some(operator @ (b'*' | b'/')) = self.next() {
            self.at += 1;
            let right = self.factor()?;
            value = if operator == b'*' { value * right } else { value / right };
        }
        Ok(value)
    }

    /// A number, a signed factor or a sum in parentheses.
    fn factor(&mut self) -> Result<f64, String> {
        let Some(first) = self.next() else {
            return Err(self.expected("a number"));
        };
        if let Some((value, length)) = number(&self.bytes[self.at..]) {
            self.at += length;
            return Ok(value);
        }
        if !matches!(first, b'+' | b'-' | b'(') {
            return Err(self.expected("a number, a sign or a parenthesis"));
        }
        if self.depth == DEEPEST {
            return Err(format!("is nested more than {DEEPEST} deep"));
        }
        self.at += 1;
        self.depth += 1;
        let value = match first {
            b'(' => {
                let value = self.sum()?;
                if self.next() != Some(b')') {
                    return Err(self.expected("a closing parenthesis"));
                }
                self.at += 1;
                value
            }
            b'-' => -self.factor()?,
            _ => self.factor()?,
        };
        self.depth -= 1;
        Ok(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_number_is_found_as_people_write_it() {
        for (text, want) in [
            ("6 * 7 = 42.", Some(42.0)),
            ("The total is $1,234.50, as asked", Some(1234.5)),
            ("x = -3", Some(-3.0)),
            ("x = \u{2212}3", Some(-3.0)),
            ("12-5", Some(5.0)),
            ("(2)-5", Some(5.0)),
            ("COVID-19", Some(19.0)),
            ("about .5", Some(0.5)),
            ("2e-3 m", Some(0.002)),
            ("2em", Some(2.0)),
            ("1,2,3", Some(3.0)),
            ("1,2345", Some(2345.0)),
            ("1234,567", Some(567.0)),
            ("version 1.2.3", Some(3.0)),
            ("it ends.", None),
            ("", None),
            ("é9日", Some(9.0)),
            ("1e999", Some(f64::INFINITY)),
        ] {
            assert_eq!(last_number(text), want, "{text}");
        }
    }

    #[test]
    fn expressions_have_the_values_of_school() {
        for (text, want) in [
            ("7", 7.0),
            (" 1 + 2 * 3 ", 7.0),
            ("(1 + 2) * 3", 9.0),
            ("8 / 4 / 2", 1.0),
            ("8 - 4 - 2", 2.0),
            ("-2 * -3", 6.0),
            ("2--3", 5.0),
            ("+5", 5.0),
            ("1,000 / 8", 125.0),
            (".5*4", 2.0),
            ("-(1+1)", -2.0),
            ("1e3", 1000.0),
        ] {
            assert_eq!(evaluate(text), Ok(want), "{text}");
        }
    }

    #[test]
    fn what_is_not_an_expression_is_refused() {
        for (text, part) in [
            ("", "expected a number"),
            ("1 +", "expected a number"),
            ("(1", "closing parenthesis"),
            ("1)", "an operator or its end"),
            ("1 2", "an operator or its end"),
            ("2 ** 3", "a number, a sign or a parenthesis"),
            ("x", "a number, a sign or a parenthesis"),
            ("1 / 0", "no finite value"),
            ("0 / 0", "no finite value"),
            ("1e999", "no finite value"),
            ("日", "a number, a sign or a parenthesis"),
        ] {
            let problem = evaluate(text).unwrap_err();
            assert!(problem.contains(part), "{problem}");
        }
        let deep = "(".repeat(1_000_000);
        assert!(evaluate(&deep).unwrap_err().contains("nested more than 100 deep"));
        assert!(evaluate(&"-".repeat(1_000_000)).is_err());
        assert_eq!(evaluate(&format!("{}1{}", "(".repeat(100), ")".repeat(100))), Ok(1.0));
    }
}
