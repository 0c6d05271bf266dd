//! The audit as a picture: ROC curves beside what the proof allows, and the bound beside ε.

use std::fmt::Write;

use tercet_private::audit::membership::Membership;
use tercet_private::audit::report::Report;

use crate::svg::{open, text};

const SIDE: f64 = 300.0;
const LEFT: f64 = 62.0;
const TOP: f64 = 96.0;
/// Left of the second panel, and its width.
const SECOND: f64 = 470.0;
const NARROW: f64 = 150.0;
/// What was proven, not found.
const DASHED: &str = "other\" stroke-dasharray=\"5 4";
/// No curve has more points drawn.
const POINTS: usize = 400;

/// Draws `found` beside the proven `epsilon`.
pub fn draw(found: &Report, epsilon: f64) -> String {
    let title = "What attacks show, beside what was proven";
    let mut out = open(SECOND + NARROW + 110.0, TOP + SIDE + 60.0, title);
    text(&mut out, 24.0, 34.0, "title", "start", title);
    let note = format!(
        "lower bound and intervals at {:.0} % confidence, delta {:e}",
        100.0 * found.confidence,
        found.delta
    );
    text(&mut out, 24.0, 54.0, "small", "start", &note);
    curves(&mut out, found, epsilon);
    bound(&mut out, found, epsilon);
    out.push_str("</svg>\n");
    out
}

fn curves(out: &mut String, found: &Report, epsilon: f64) {
    text(out, LEFT, TOP - 14.0, "head", "start", "share of members told by their losses");
    let at = |(fpr, tpr): (f64, f64)| (LEFT + fpr * SIDE, TOP + (1.0 - tpr) * SIDE);
    for tenth in [0.0, 0.25, 0.5, 0.75, 1.0] {
        let (x, y) = at((tenth, tenth));
        line(out, "grid", &[(LEFT, y), (LEFT + SIDE, y)]);
        text(out, LEFT - 8.0, y + 4.0, "small", "end", &format!("{tenth}"));
        text(out, x, TOP + SIDE + 18.0, "small", "middle", &format!("{tenth}"));
    }
    text(
        out,
        LEFT + SIDE / 2.0,
        TOP + SIDE + 38.0,
        "small",
        "middle",
        "share of others taken for members",
    );
    // Kairouz, Oh & Viswanath 2015: TPR ≤ min(e^ε·FPR + δ, 1 − e^−ε·(1 − δ − FPR)).
    // Past 50 the corner is the frame's.
    let odds = epsilon.min(50.0).exp();
    let allowed = |fpr: f64| {
        let high = (odds * fpr + found.delta).min(1.0);
        high.min(1.0 - (1.0 - found.delta - fpr) / odds)
    };
    let steps = (0..=200).map(|i| f64::from(i) / 200.0);
    let roof: Vec<(f64, f64)> = steps.map(|fpr| at((fpr, allowed(fpr)))).collect();
    line(out, DASHED, &roof);
    let roc = |found: &Membership| {
        // Evenly thinned; the last point stays.
        let step = found.roc.len().div_ceil(POINTS);
        let thinned = found.roc.iter().step_by(step).chain(found.roc.last());
        thinned.map(|&point| at(point)).collect::<Vec<_>>()
    };
    let mut y = TOP + SIDE - 30.0;
    let mut label = |out: &mut String, class: &str, name: &str| {
        text(out, LEFT + SIDE - 8.0, y, class, "end", name);
        y -= 16.0;
    };
    label(out, "other-text", "dashed: most that the proof allows");
    if let Some(membership) = &found.membership {
        line(out, "other", &roc(membership));
        label(out, "other-text", "members");
    }
    if let Some(membership) = found.canaries.as_ref().and_then(|c| c.membership.as_ref()) {
        line(out, "subject", &roc(membership));
        label(out, "subject-text", "canaries");
    }
}

fn bound(out: &mut String, found: &Report, epsilon: f64) {
    text(out, SECOND, TOP - 14.0, "head", "start", "epsilon");
    let shown = found.canaries.as_ref().map(|canaries| canaries.epsilon);
    let most = 1.15 * epsilon.max(shown.unwrap_or(0.0)).max(0.1);
    let at = |value: f64| TOP + (1.0 - value / most) * SIDE;
    line(out, "grid", &[(SECOND, at(0.0)), (SECOND + NARROW, at(0.0))]);
    text(out, SECOND - 8.0, at(0.0) + 4.0, "small", "end", "0");
    let proven = at(epsilon);
    line(out, DASHED, &[(SECOND, proven), (SECOND + NARROW, proven)]);
    let label = |out: &mut String, class: &str, y: f64, name: &str| {
        text(out, SECOND + NARROW + 8.0, y + 4.0, class, "start", name);
    };
    label(out, "other-text", proven, &format!("{epsilon:.2} proven"));
    let middle = SECOND + NARROW / 2.0;
    match shown {
        None => text(out, middle, at(0.0) - 12.0, "small", "middle", "no canaries"),
        Some(shown) => {
            let y = at(shown);
            line(out, "subject", &[(middle, at(0.0)), (middle, y)]);
            line(out, "subject", &[(middle - 20.0, y), (middle + 20.0, y)]);
            // Labels that would touch step aside, the higher one up.
            let aside = match y - proven {
                gap if gap.abs() >= 14.0 => 0.0,
                gap if gap >= 0.0 => 14.0 - gap,
                gap => -14.0 - gap,
            };
            label(out, "subject-text", y + aside, &format!("{shown:.2} shown"));
        }
    }
}

fn line(out: &mut String, class: &str, points: &[(f64, f64)]) {
    let mut path = String::new();
    for (i, (x, y)) in points.iter().enumerate() {
        let _ = write!(path, "{}{x:.1} {y:.1}", if i == 0 { "M" } else { "L" });
    }
    let _ = writeln!(out, "<path class=\"{class}\" fill=\"none\" d=\"{path}\"/>");
}

#[cfg(test)]
mod tests {
    use tercet_private::audit::report::{Kind, Scored, audit};

    use super::*;

    fn found(apart: f64) -> Report {
        let row = |i: u32| {
            let included = i.is_multiple_of(2);
            let score = f64::from(i * 7919 % 1009) / 1009.0 - if included { apart } else { 0.0 };
            Scored { id: i.to_string(), included, score, kind: Kind::Canary, candidates: vec![] }
        };
        audit(&(0..300).map(row).collect::<Vec<_>>(), 1e-5, 0.05).unwrap()
    }

    #[test]
    fn every_curve_stays_inside_its_frame() {
        for (apart, epsilon) in [(0.0, 0.0), (2.0, 1.0), (0.3, 50.0), (2.0, 1e6)] {
            let svg = draw(&found(apart), epsilon);
            assert!(!svg.contains("NaN") && !svg.contains("inf"), "{epsilon}");
            for path in svg.lines().filter(|line| line.starts_with("<path")) {
                let d = path.split("d=\"").nth(1).unwrap().split('"').next().unwrap();
                for point in d.split(['M', 'L']).filter(|point| !point.is_empty()) {
                    let (x, y) = point.split_once(' ').unwrap();
                    let (x, y): (f64, f64) = (x.parse().unwrap(), y.parse().unwrap());
                    assert!((LEFT..=SECOND + NARROW).contains(&x), "{path}");
                    assert!((TOP - 0.1..=TOP + SIDE + 0.1).contains(&y), "{path}");
                }
            }
        }
    }

    #[test]
    fn the_bound_is_drawn_above_the_proof_when_it_refutes_it() {
        let svg = draw(&found(2.0), 1.0);
        assert!(svg.contains("1.00 proven") && svg.contains("shown"));
        let y = |label: &str| -> f64 {
            let line = svg.lines().find(|line| line.contains(label)).unwrap();
            line.split("y=\"").nth(1).unwrap().split('"').next().unwrap().parse().unwrap()
        };
        assert!(y("shown") < y("1.00 proven"), "above is a smaller y");
    }
}
