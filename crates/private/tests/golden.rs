//! Values of other accountants and of 60-digit integration (`data/dp_accounting.csv`).
//!
//! The file's columns: case, kind, q, q_expr, sigma, steps, delta, alpha, quantity, value, tool,
//! settings, note; made with opacus 1.6.0, dp-accounting 0.6.0, prv-accountant 0.2.0, mpmath 1.4.1 and
//! scipy 1.17.1. Values are written with 12 digits, so nothing is compared below 5·10⁻¹².

use std::collections::BTreeMap;

use tercet_private::accounting::calibrate::{self, Accountant};
use tercet_private::accounting::{Phase, gaussian, gdp, pld, rdp, rdp_filter};
use tercet_private::audit::one_run::{self, Guesses};

struct Row {
    case: String,
    kind: String,
    fields: Vec<String>,
}

impl Row {
    fn text(&self, column: usize) -> &str {
        &self.fields[column]
    }

    fn number(&self, column: usize) -> f64 {
        let text = self.text(column);
        text.parse().unwrap_or_else(|_| panic!("{}: column {column} is `{text}`", self.case))
    }

    fn value(&self) -> f64 {
        self.number(9)
    }

    fn tool(&self) -> &str {
        self.text(10)
    }

    /// One phase, or as many as `sigma@rate x steps;…` lists.
    fn phases(&self) -> Vec<Phase> {
        if !self.text(4).contains('@') {
            let steps = self.text(5).parse().unwrap();
            return vec![Phase::new(self.number(4), self.number(2), steps).unwrap()];
        }
        let phase = |part: &str| {
            let (sigma, rest) = part.split_once('@').unwrap();
            let (rate, steps) = rest.split_once('x').unwrap();
            let (sigma, rate) = (sigma.parse().unwrap(), rate.parse().unwrap());
            Phase::new(sigma, rate, steps.parse().unwrap()).unwrap()
        };
        self.text(4).split(';').map(phase).collect()
    }
}

/// Commas within double quotes belong to the field.
fn rows(kinds: &[&str]) -> Vec<Row> {
    let mut rows = Vec::new();
    for line in include_str!("data/dp_accounting.csv").lines().skip(1) {
        let (mut fields, mut quoted) = (vec![String::new()], false);
        for c in line.chars() {
            match c {
                '"' => quoted = !quoted,
                ',' if !quoted => fields.push(String::new()),
                c => fields.last_mut().unwrap().push(c),
            }
        }
        let row = Row { case: fields[0].clone(), kind: fields[1].clone(), fields };
        if kinds.contains(&row.kind.as_str()) {
            rows.push(row);
        }
    }
    rows
}

/// Counts rows and keeps the largest error, so that the test says what it saw.
#[derive(Default)]
struct Seen(BTreeMap<String, (usize, f64)>);

impl Seen {
    fn check(&mut self, row: &Row, error: f64, tolerance: f64) {
        let kind = row.kind.as_str();
        let quantity = row.text(8);
        let label = format!("{kind}/{quantity} ({}) within {tolerance:.0e}", row.tool());
        let (rows, worst) = self.0.entry(label).or_default();
        *rows += 1;
        *worst = worst.max(error);
        assert!(error <= tolerance, "{} {quantity}: off by {error:e}", row.case);
    }

    fn finish(self, rows: usize) {
        let checked: usize = self.0.values().map(|(n, _)| n).sum();
        for (label, (n, worst)) in self.0 {
            println!("{n:4} {label}: worst {worst:.1e}");
        }
        assert_eq!(checked, rows, "rows that no check has looked at");
    }
}

fn relative(ours: f64, theirs: f64) -> f64 {
    (ours / theirs - 1.0).abs()
}

/// Opacus' 151 orders.
fn opacus_orders() -> Vec<f64> {
    (11..110).map(|i| f64::from(i) / 10.0).chain((12..64).map(f64::from)).collect()
}

#[test]
fn epsilon_agrees_with_four_accountants_and_brackets_the_truth() {
    let rows = rows(&["dpsgd", "gauss", "hetero"]);
    let mut bounds: BTreeMap<String, pld::Bounds> = BTreeMap::new();
    let mut seen = Seen::default();
    for row in &rows {
        let (phases, delta, value) = (row.phases(), row.number(6), row.value());
        let ours = *bounds
            .entry(row.case.clone())
            .or_insert_with(|| pld::epsilon(&phases, delta).unwrap().both());
        let middle = 0.5 * (ours.lower + ours.upper);
        let opacus = row.tool().starts_with("opacus");
        let orders = if opacus { opacus_orders() } else { rdp::default_orders() };
        match row.text(8) {
            "eps_rdp" if opacus => {
                let found = rdp::epsilon(&phases, delta, &orders).unwrap();
                seen.check(row, relative(found.epsilon, value), 1e-6);
            }
            // dp-accounting adds the absolute values of an alternating series at fractional orders:
            // an upper bound that is never below ours, equal at whole orders, and up to some 3 %
            // larger at small fractional ones (see the rows of one order).
            "eps_rdp" => {
                let found = rdp::epsilon(&phases, delta, &orders).unwrap();
                let whole = found.order == found.order.floor();
                assert!(found.epsilon <= value * (1.0 + 1e-9), "{}", row.case);
                seen.check(row, relative(found.epsilon, value), if whole { 1e-6 } else { 0.04 });
            }
            "eps_rdp_best_alpha" => {
                let found = rdp::epsilon(&phases, delta, &orders).unwrap();
                // Two neighbouring orders may give the same ε to more digits than either is worth.
                let theirs = rdp::epsilon(&phases, delta, &[value]).unwrap().epsilon;
                // dp-accounting's series shifts its choice where it is looser.
                seen.check(row, relative(found.epsilon, theirs), if opacus { 1e-8 } else { 0.04 });
            }
            "eps_rdp_classic" => {
                // Mironov 2017: ε = ρ + log(1/δ)/(α−1).
                let classic = |&order: &f64| {
                    let rho: f64 = (phases.iter())
                        .map(|p| {
                            let rho = rdp::rho(p.sigma(), p.rate(), order).unwrap();
                            rho * p.steps() as f64
                        })
                        .sum();
                    rho - delta.ln() / (order - 1.0)
                };
                let best = opacus_orders().iter().map(classic).fold(f64::INFINITY, f64::min);
                seen.check(row, relative(best, value), 1e-6);
            }
            // Rigorous bounds of others: ours must lie on the other side of them.
            "eps_pld_upper" => seen.check(row, (ours.lower - value).max(0.0), 0.0),
            "eps_prv_lower" => seen.check(row, (value - ours.lower).max(0.0), 0.0),
            "eps_prv_upper" => seen.check(row, (ours.upper - value).max(0.0), 0.0),
            "eps_prv_estimate" => seen.check(row, (middle - value).abs(), 2e-3),
            "eps_exact" => {
                assert!(ours.lower <= value && value <= ours.upper, "{}: {ours:?}", row.case);
                let exact = gaussian::epsilon(gaussian::mu(&phases).unwrap(), delta).unwrap();
                seen.check(row, relative(exact, value), 1e-9);
            }
            "mu_gdp_exact" => {
                seen.check(row, relative(gaussian::mu(&phases).unwrap(), value), 1e-9)
            }
            "mu_gdp_clt" => seen.check(row, relative(gdp::mu_clt(&phases).unwrap(), value), 1e-9),
            "eps_gdp_clt" => {
                let found = gdp::epsilon_clt(&phases, delta).unwrap();
                seen.check(row, relative(found, value), 1e-6);
            }
            other => panic!("{}: unknown quantity {other}", row.case),
        }
    }
    seen.finish(rows.len());
}

#[test]
fn one_order_is_the_integral_of_sixty_digits() {
    let rows = rows(&["rdp_order"]);
    let mut seen = Seen::default();
    for row in &rows {
        let order = row.number(7);
        let ours = rdp::rho(row.number(4), row.number(2), order).unwrap();
        let error = relative(ours, row.value());
        let whole = order == order.floor();
        match row.tool() {
            // 1e-6 is what is asked of fractional orders; the integral here keeps the 1e-9.
            "mpmath 1.4.1" => seen.check(row, error, 1e-9),
            // Their own errors: cancellation (up to 9e-7 at q = 1e-6), and a looser series.
            "opacus 1.6.0" => seen.check(row, error, 1e-6),
            _ => {
                assert!(ours <= row.value() * (1.0 + 1e-8), "{}", row.case);
                seen.check(row, error, if whole { 1e-6 } else { 0.04 });
            }
        }
    }
    seen.finish(rows.len());
}

#[test]
fn the_gaussian_curve_inverts_as_others_do() {
    let rows = rows(&["gdp_dual"]);
    let mut seen = Seen::default();
    for row in &rows {
        let mu: f64 = row.text(11).strip_prefix("mu=").unwrap().parse().unwrap();
        let ours = gaussian::epsilon(mu, row.number(6)).unwrap();
        seen.check(row, relative(ours, row.value()), 1e-9);
    }
    seen.finish(rows.len());
}

#[test]
fn the_filter_allows_the_steps_that_one_order_allows() {
    let rows = rows(&["rdp_filter"]);
    let mut seen = Seen::default();
    for row in &rows {
        let target = row.text(12).strip_prefix("target_eps=").unwrap().parse().unwrap();
        let (delta, sigma, rate) = (row.number(6), row.number(4), row.number(2));
        let plan = ((target, delta), (sigma, rate));
        let (order, steps) = rdp_filter::best_order(plan.0, plan.1, &opacus_orders()).unwrap();
        match row.text(8) {
            "filter_alpha_star" => seen.check(row, (order - row.value()).abs(), 0.0),
            "filter_budget_R" => {
                let budget = rdp_filter::budget(target, delta, order).unwrap();
                seen.check(row, relative(budget, row.value()), 1e-9);
            }
            "rho_step" => {
                let rho = rdp::rho(sigma, rate, order).unwrap();
                seen.check(row, relative(rho, row.value()), 1e-6);
            }
            // A ratio of 10⁶ known to 10⁻⁹ is known to a step.
            "max_steps" => seen.check(row, (steps as f64 - row.value()).abs(), 1.0),
            other => panic!("unknown quantity {other}"),
        }
    }
    seen.finish(rows.len());
}

#[test]
fn calibrated_noise_is_what_others_found_and_never_above_the_target() {
    let rows = rows(&["calibrate"]);
    let mut seen = Seen::default();
    for row in &rows {
        let target: f64 = row.text(12).strip_prefix("target_eps=").unwrap().parse().unwrap();
        let (delta, rate, steps) = (row.number(6), row.number(2), row.text(5).parse().unwrap());
        let by_pld = row.text(8).ends_with("_pld");
        let accountant = if by_pld { Accountant::Pld } else { Accountant::Rdp };
        let found = calibrate::sigma(accountant, (target, delta), rate, steps).unwrap();
        assert!(found.epsilon <= target, "{}: {found:?}", row.case);
        if by_pld {
            // Theirs stops within 10⁻⁴ of σ; its grid's pessimism of up to 10⁻⁴ in ε is less than
            // that again in σ, since |dε/dσ| > 1 in every row.
            seen.check(row, (found.sigma - row.value()).abs(), 2e-4);
        } else {
            // Theirs stops within 10⁻³ of ε: compared by what its σ costs.
            let theirs = Phase::new(row.value(), rate, steps).unwrap();
            let cost = accountant.epsilon(&[theirs], delta).unwrap();
            seen.check(row, (cost - target).abs(), 1.001e-3);
        }
    }
    seen.finish(rows.len());
}

#[test]
fn noise_split_wrongly_and_noise_from_the_limit_cost_what_the_table_says() {
    let rows = rows(&["group_clip", "gdp_trap"]);
    let mut seen = Seen::default();
    for row in &rows {
        let value = row.value();
        match row.text(8) {
            "sigma_eff" => {
                // s_g = σ·C_g on G groups: σ_eff = σ/sqrt(G). The case is named `…_s1.0_G12`.
                let (_, groups) = row.case.rsplit_once("_G").unwrap();
                let groups: f64 = groups.parse().unwrap();
                seen.check(row, relative(row.number(4) / groups.sqrt(), value), 1e-9);
            }
            "sigma_from_gdp_clt" => {
                let (_, target) = row.case.rsplit_once("_eps").unwrap();
                let target: f64 = target.parse().unwrap();
                let steps = row.text(5).parse().unwrap();
                let phase = Phase::new(value, row.number(2), steps).unwrap();
                let limit = gdp::epsilon_clt(&[phase], row.number(6)).unwrap();
                seen.check(row, relative(limit, target), 1e-6);
            }
            quantity => {
                let mut phases = row.phases();
                if let Some((_, groups)) = row.case.rsplit_once("_G") {
                    let groups: f64 = groups.parse().unwrap();
                    let sigma = row.number(4) / groups.sqrt();
                    phases = vec![Phase::new(sigma, row.number(2), phases[0].steps()).unwrap()];
                }
                let delta = row.number(6);
                if quantity == "eps_rdp" {
                    let found = rdp::epsilon(&phases, delta, &opacus_orders()).unwrap();
                    seen.check(row, relative(found.epsilon, value), 1e-6);
                } else {
                    let ours = pld::epsilon(&phases, delta).unwrap().both();
                    // An upper bound on a grid of 10⁻³ or 10⁻⁴; ours must not contradict it, nor be
                    // looser by more than what both grids are worth.
                    assert!(ours.lower <= value, "{}: {ours:?} {value}", row.case);
                    seen.check(row, (ours.upper / value - 1.0).abs(), 5e-3);
                }
            }
        }
    }
    seen.finish(rows.len());
}

#[test]
fn the_audits_lower_bound_is_that_of_the_papers_algorithm() {
    let rows = rows(&["one_run_audit"]);
    let mut seen = Seen::default();
    for row in &rows {
        // The settings read `m=1000;r=600;v=600;p=0.05 (…)`.
        let settings = row.text(11).split_once(' ').unwrap().0;
        let setting = |name: &str| {
            let mut pairs = settings.split(';').filter_map(|pair| pair.split_once('='));
            pairs.find(|pair| pair.0 == name).unwrap().1
        };
        let count = |name| setting(name).parse().unwrap();
        let guesses = Guesses { canaries: count("m"), made: count("r"), right: count("v") };
        let p = setting("p").parse().unwrap();
        let ours = one_run::epsilon_lower_bound(guesses, row.number(6), p).unwrap();
        // Their twelve digits, of a root found to about as many; 0 is 0.
        seen.check(row, (ours - row.value()).abs(), 1e-11 * row.value());
    }
    seen.finish(rows.len());
}

#[test]
fn no_row_is_without_a_test() {
    let kinds = ["dpsgd", "gauss", "hetero", "rdp_order", "gdp_dual", "rdp_filter", "calibrate"];
    let others = ["group_clip", "gdp_trap", "one_run_audit"];
    let all = include_str!("data/dp_accounting.csv").lines().count() - 1;
    assert_eq!((rows(&kinds).len() + rows(&others).len(), all), (735, 735));
}
