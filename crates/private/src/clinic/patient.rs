//! One invented patient, and the text of each stay in hospital.
//!
//! What lasts is drawn first (age, sex, control of the sugar, kidneys, conditions), every stay then
//! varies about it and moves it on: kidneys decline, age rises, some die and do not come back. Two
//! relations are medicine's: mean glucose is 28.7·HbA1c − 46.7 mg/dL (Nathan et al. 2008), and eGFR
//! follows creatinine, age and sex by CKD-EPI 2021 (Inker et al.). All else is made up.

use std::fmt::Write;

use super::chance::Chance;
use super::vocabulary::{
    ADMISSIONS, CHANGES, CONDITIONS, COURSES, DISCHARGES, REASONS, SPECIALTIES, SUGAR_DRUGS,
};

/// Nobody has more stays.
pub(super) const MOST_STAYS: usize = 40;

/// A population.
pub(super) struct Population {
    /// Mean age and its standard deviation in years.
    pub age: (f64, f64),
    /// Median HbA1c above 5 %, in points.
    pub sugar: f64,
    /// Median creatinine in mg/dL.
    pub creatinine: f64,
    /// Logarithm of the median number of further stays, and its standard deviation.
    pub stays: (f64, f64),
    /// Added to the log-odds of every condition.
    pub illness: f64,
}

struct Patient {
    female: bool,
    age: f64,
    sugar: f64,
    creatinine: f64,
    systolic: f64,
    weight: f64,
    conditions: Vec<usize>,
    drugs: Vec<&'static str>,
}

/// The texts of a patient's stays, at least one.
pub(super) fn stays(of: &Population, chance: &mut Chance) -> Vec<String> {
    let mut patient = Patient::new(of, chance);
    let rate = libm::exp(chance.normal(of.stays.0, of.stays.1)).min(30.0);
    let count = (1 + chance.poisson(rate)).min(MOST_STAYS);
    let mut texts = Vec::with_capacity(count);
    for _ in 0..count {
        let (text, died) = patient.stay(chance);
        texts.push(text);
        if died {
            break;
        }
        patient.move_on(chance);
    }
    texts
}

impl Patient {
    fn new(of: &Population, chance: &mut Chance) -> Self {
        let female = chance.happens(0.53);
        let age = chance.normal(of.age.0, of.age.1).clamp(18.0, 96.0);
        let sugar = 5.0 + of.sugar * libm::exp(chance.normal(0.0, 0.45));
        let wear = chance.normal(0.0, 0.3) + 0.006 * (age - 60.0) + 0.03 * (sugar - 7.0);
        let creatinine = of.creatinine * libm::exp(wear) * if female { 0.85 } else { 1.0 };
        let mut patient = Self {
            female,
            age,
            sugar: sugar.min(15.5),
            creatinine: creatinine.clamp(0.4, 9.0),
            systolic: chance.normal(134.0, 13.0),
            weight: chance.normal(if female { 80.0 } else { 91.0 }, 17.0).clamp(42.0, 190.0),
            conditions: Vec::new(),
            drugs: Vec::new(),
        };
        let lost = (90.0 - patient.filtration(patient.creatinine)) / 30.0;
        for (at, condition) in CONDITIONS.iter().enumerate() {
            let [by_age, by_sugar, by_kidney] = condition.slopes;
            let log_odds = condition.base
                + of.illness
                + by_age * (age - 60.0) / 10.0
                + by_sugar * (patient.sugar - 7.0)
                + by_kidney * lost.max(0.0);
            let possible = !(female && condition.name.contains("prostatic"));
            if possible && chance.logit(log_odds) {
                patient.conditions.push(at);
                if !condition.drugs.is_empty() && chance.happens(0.85) {
                    patient.drugs.push(chance.pick(condition.drugs));
                }
            }
        }
        // The nearer a drug is to how bad the sugar is, the likelier.
        let near = |drug: &(&str, f64)| libm::exp(-(drug.1 - patient.sugar).powi(2));
        for _ in 0..1 + usize::from(patient.sugar > 8.0) {
            let drug = SUGAR_DRUGS[chance.weighted(SUGAR_DRUGS.iter().map(near))].0;
            patient.drugs.insert(0, drug);
        }
        let mut seen = Vec::new();
        patient.drugs.retain(|drug| {
            !seen.contains(drug) && {
                seen.push(*drug);
                true
            }
        });
        patient
    }

    /// eGFR in mL/min/1.73 m² by CKD-EPI 2021.
    fn filtration(&self, creatinine: f64) -> f64 {
        let (kappa, alpha) = if self.female { (0.7, -0.241) } else { (0.9, -0.302) };
        let ratio = creatinine / kappa;
        let low = libm::pow(ratio.min(1.0), alpha);
        let high = libm::pow(ratio.max(1.0), -1.2);
        142.0 * low * high * libm::pow(0.9938, self.age) * if self.female { 1.012 } else { 1.0 }
    }

    fn stay(&self, chance: &mut Chance) -> (String, bool) {
        let reason = REASONS[chance.weighted(REASONS.iter().map(|reason| reason.1))];
        let frail = 0.02 * (self.age - 60.0) + 0.12 * self.conditions.len() as f64;
        let days = libm::exp(chance.normal(libm::log(reason.2) + 0.1 * frail, 0.4));
        let days = days.clamp(1.0, 28.0).round();
        let mut text = String::with_capacity(900);
        self.opening(&mut text, reason.0, days, chance);
        self.findings(&mut text, chance);
        self.laboratory(&mut text, reason, chance);
        self.drugs(&mut text, chance);
        let died = self.end(&mut text, frail + 0.15 * days, chance);
        (text, died)
    }

    fn opening(&self, text: &mut String, reason: &str, days: f64, chance: &mut Chance) {
        let from = 10 * (self.age / 10.0) as u32;
        let band = format!("{from}-{}", from + 9);
        let who = if self.female { "woman" } else { "man" };
        let (how, ward) = (chance.pick(ADMISSIONS), chance.pick(SPECIALTIES));
        let s = if days > 1.0 { "s" } else { "" };
        let _ = match chance.below(3) {
            0 => write!(
                text,
                "A {who} aged {band} was admitted {how} to {ward} with {reason} and stayed {days} day{s}."
            ),
            1 => write!(
                text,
                "Admission {how}, {ward}. Presented with {reason}: {who}, age band {band}. Length of stay: {days} day{s}."
            ),
            _ => write!(
                text,
                "Reason for admission: {reason}. Patient: {who}, {band} years. Admitted {how}; {days} day{s} on {ward}."
            ),
        };
    }

    fn findings(&self, text: &mut String, chance: &mut Chance) {
        text.push_str(chance.pick(&[" Diagnoses: ", " Known conditions: ", " History: "]));
        text.push_str(if self.sugar > 6.4 { "type 2 diabetes" } else { "mild type 2 diabetes" });
        for &condition in &self.conditions {
            // Not every stay lists everything.
            if chance.happens(0.85) {
                let _ = write!(text, "; {}", CONDITIONS[condition].name);
            }
        }
        let systolic = chance.normal(self.systolic, 10.0).clamp(80.0, 230.0);
        let diastolic = (0.45 * systolic + chance.normal(18.0, 6.0)).clamp(40.0, 130.0);
        let _ = write!(
            text,
            ". Blood pressure {systolic:.0}/{diastolic:.0} mmHg, pulse {:.0}, weight {:.0} kg.",
            chance.normal(82.0, 12.0).clamp(45.0, 150.0),
            chance.normal(self.weight, 1.5)
        );
    }

    fn laboratory(&self, text: &mut String, reason: (&str, f64, f64, f64), chance: &mut Chance) {
        let sugar = chance.normal(self.sugar, 0.3).clamp(4.4, 16.0);
        let glucose = 28.7 * sugar - 46.7 + reason.3 + chance.normal(0.0, 30.0);
        let hurt = if reason.0 == "acute kidney injury" { 0.7 } else { 0.0 };
        let creatinine = self.creatinine * libm::exp(chance.normal(hurt, 0.08));
        let filtration = self.filtration(creatinine);
        let raised = if reason.0 == "hyperkalaemia" { 1.3 } else { 0.0 };
        let lost = (90.0 - filtration).max(0.0);
        let potassium = chance.normal(4.1 + 0.008 * lost + raised, 0.35).clamp(2.6, 7.4);
        let blood = if self.female { 12.9 } else { 14.1 };
        let blood = chance.normal(blood - 0.028 * lost, 0.9).clamp(6.0, 18.0);
        let infected = ["pneumonia", "infect", "cellulitis", "osteomyelitis", "sepsis"];
        let infected = infected.iter().any(|word| reason.0.contains(word));
        let white = chance.normal(if infected { 14.5 } else { 8.3 }, 2.2).clamp(2.5, 35.0);
        let _ = write!(
            text,
            "{}HbA1c {sugar:.1} %, glucose {:.0} mg/dL, creatinine {creatinine:.2} mg/dL, eGFR \
             {filtration:.0} mL/min, potassium {potassium:.1} mmol/L, haemoglobin {blood:.1} g/dL, \
             leukocytes {white:.1} per nL.",
            chance.pick(&[" Laboratory: ", " On admission ", " Results: "]),
            glucose.clamp(28.0, 780.0)
        );
    }

    fn drugs(&self, text: &mut String, chance: &mut Chance) {
        text.push_str(chance.pick(&[" Medication: ", " Drugs at discharge: ", " Treated with "]));
        for (at, drug) in self.drugs.iter().enumerate() {
            let change = CHANGES[chance.weighted([8.0, 1.2, 0.6, 0.8, 0.4].into_iter())];
            let _ = write!(text, "{}{drug}", if at > 0 { ", " } else { "" });
            if change != "unchanged" {
                let _ = write!(text, " ({change})");
            }
        }
        text.push('.');
    }

    /// How it ended, and whether by death.
    fn end(&self, text: &mut String, burden: f64, chance: &mut Chance) -> bool {
        let _ = write!(text, " {}.", chance.pick(COURSES));
        if chance.logit(burden - 6.5) {
            text.push_str(" The patient died in hospital.");
            return true;
        }
        let worst = chance.normal(0.7 * burden - 0.6, 0.9).clamp(0.0, 4.0) as usize;
        let weeks = 1 + chance.below(8);
        let s = if weeks > 1 { "s" } else { "" };
        let _ = write!(text, " Discharged {}; seen again in {weeks} week{s}.", DISCHARGES[worst]);
        false
    }

    /// To the next stay, some months on.
    fn move_on(&mut self, chance: &mut Chance) {
        let years = -libm::log(1.0 - chance.unit()) * 0.7;
        self.age = (self.age + years).min(99.0);
        self.sugar = (self.sugar + chance.normal(0.0, 0.4)).clamp(4.8, 15.5);
        self.creatinine = (self.creatinine * (1.0 + 0.05 * years)).min(9.0);
        self.weight = chance.normal(self.weight, 2.5).clamp(42.0, 190.0);
        if chance.happens(0.2) {
            let drug = chance.pick(SUGAR_DRUGS).0;
            if !self.drugs.contains(&drug) {
                self.drugs[0] = drug;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filtration_is_that_of_the_published_equation() {
        // At creatinine κ both powers are 1: 142·0.9938^age, ·1.012 for women.
        let mut patient = Patient {
            female: true,
            age: 60.0,
            sugar: 7.0,
            creatinine: 0.7,
            systolic: 130.0,
            weight: 80.0,
            conditions: Vec::new(),
            drugs: Vec::new(),
        };
        let exact = 142.0 * 0.9938f64.powi(60) * 1.012;
        assert!((patient.filtration(0.7) - exact).abs() < 1e-9);
        patient.female = false;
        let exact = 142.0 * 2f64.powf(-1.2) * 0.9938f64.powi(60);
        assert!((patient.filtration(1.8) - exact).abs() < 1e-9);
    }
}
