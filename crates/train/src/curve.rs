//! The loss curve as a picture: `curve.svg`.

use plotters::prelude::*;

use crate::error::{Error, Result};
use crate::metrics::StepRecord;

/// Width and height in pixels.
const SIZE: (u32, u32) = (960, 540);
/// Points drawn of each line at most; a picture shows no more.
const POINTS: usize = 1500;

const TRAIN_RAW: RGBColor = RGBColor(190, 205, 225);
const TRAIN: RGBColor = RGBColor(31, 95, 175);
const VALIDATION: RGBColor = RGBColor(210, 90, 20);
const BASELINE: RGBColor = RGBColor(120, 120, 120);

/// Draws training loss (each step, and smoothed), validation loss, and, as a dashed line, the
/// `unigram` entropy that a model without context would reach. `unit` is that of the
/// losses. Returns the text of an SVG file.
pub fn draw(records: &[StepRecord], unigram: Option<f64>, unit: &str) -> Result<String> {
    let name = if unit.is_empty() { "loss".to_owned() } else { format!("loss ({unit})") };
    let train: Vec<(f64, f64)> =
        records.iter().filter_map(|r| Some((r.step as f64, r.loss?))).collect();
    let validation: Vec<(f64, f64)> = records
        .iter()
        .filter_map(|r| Some((r.step as f64, r.validation_loss?)))
        .filter(|point| point.1.is_finite())
        .collect();
    let mut svg = String::new();
    plot(&mut svg, &train, &validation, unigram, &name)
        .map_err(|error| Error::Data(format!("the loss curve cannot be drawn: {error}")))?;
    Ok(svg)
}

fn plot(
    svg: &mut String,
    train: &[(f64, f64)],
    validation: &[(f64, f64)],
    unigram: Option<f64>,
    name: &str,
) -> Result<(), Box<dyn std::error::Error>> {
    let losses = || train.iter().chain(validation).map(|point| point.1).chain(unigram);
    let (low, high) = losses().fold((f64::MAX, f64::MIN), |(a, b), y| (a.min(y), b.max(y)));
    let (low, high) = if low <= high { (low, high) } else { (0.0, 1.0) };
    let margin = (0.05 * (high - low)).max(0.05);
    let last = train.iter().chain(validation).map(|point| point.0).fold(1.0, f64::max);

    let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .margin(16)
        .x_label_area_size(44)
        .y_label_area_size(60)
        .build_cartesian_2d(0.0..last, (low - margin).max(0.0)..high + margin)?;
    chart
        .configure_mesh()
        .light_line_style(WHITE)
        .bold_line_style(RGBColor(230, 230, 230))
        .x_label_formatter(&|step| format!("{step}"))
        .x_desc("step")
        .y_desc(name)
        .label_style(("sans-serif", 14))
        .axis_desc_style(("sans-serif", 15))
        .draw()?;
    let key = |color: RGBColor| {
        move |(x, y)| PathElement::new(vec![(x, y), (x + 20, y)], color.stroke_width(2))
    };
    chart.draw_series(LineSeries::new(thin(train), TRAIN_RAW.stroke_width(1)))?;
    chart
        .draw_series(LineSeries::new(thin(&smooth(train)), TRAIN.stroke_width(2)))?
        .label("training")
        .legend(key(TRAIN));
    if !validation.is_empty() {
        chart
            .draw_series(LineSeries::new(thin(validation), VALIDATION.stroke_width(2)))?
            .label("validation")
            .legend(key(VALIDATION));
        let dots = thin(validation).into_iter().map(|p| Circle::new(p, 3, VALIDATION.filled()));
        chart.draw_series(dots)?;
    }
    if let Some(unigram) = unigram {
        chart
            .draw_series(DashedLineSeries::new(
                [(0.0, unigram), (last, unigram)],
                6,
                5,
                BASELINE.stroke_width(1),
            ))?
            .label(format!("unigram entropy {unigram:.2}"))
            .legend(key(BASELINE));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .background_style(WHITE.mix(0.9))
        .border_style(RGBColor(200, 200, 200))
        .label_font(("sans-serif", 14))
        .draw()?;
    root.present()?;
    Ok(())
}

/// Exponential moving average over about a fiftieth of the run.
fn smooth(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let keep = 1.0 - 1.0 / (1.0 + points.len() as f64 / 50.0);
    let mut average = points.first().map_or(0.0, |point| point.1);
    let step = |&(x, y): &(f64, f64)| {
        average = keep * average + (1.0 - keep) * y;
        (x, average)
    };
    points.iter().map(step).collect()
}

/// At most [`POINTS`] of the points, the last always among them.
fn thin(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let every = points.len().div_ceil(POINTS).max(1);
    points.iter().rev().step_by(every).rev().copied().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(step: u64, loss: Option<f64>) -> StepRecord {
        StepRecord {
            step,
            tokens: step,
            loss,
            lr: 0.1,
            grad_norm: loss,
            skipped: loss.is_none(),
            loss_z: None,
            grad_norm_z: None,
            validation_loss: step.is_multiple_of(10).then_some(3.0),
            seconds: 1.0,
            measures: Default::default(),
        }
    }

    #[test]
    fn the_curve_has_labels_lines_and_no_broken_numbers() {
        let records: Vec<_> =
            (1..5000).map(|i| record(i, (i % 7 != 0).then_some(9.0 - (i as f64).ln()))).collect();
        let svg = draw(&records, Some(6.5), "nats per token").unwrap();
        for text in ["<svg", "training", "validation", "unigram entropy 6.50", "nats per token"] {
            assert!(svg.contains(text), "{text}");
        }
        assert!(!svg.contains("NaN") && !svg.contains("inf"));
        assert!(svg.len() < 400_000, "{} bytes", svg.len());
    }

    #[test]
    fn a_run_without_a_single_good_step_still_gets_a_picture() {
        for records in [vec![], vec![record(1, None)], vec![record(1, Some(2.0))]] {
            let svg = draw(&records, None, "").unwrap();
            assert!(svg.contains("</svg>") && !svg.contains("NaN"));
        }
    }
}
