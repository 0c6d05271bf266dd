//! Pictures of a run: lines over steps, and the histogram of Δ. All are the text of an SVG file.

use plotters::prelude::*;

use tercet_train::{Error, Result};

/// Width and height in pixels.
const SIZE: (u32, u32) = (960, 540);
/// Points drawn of each line at most; a picture shows no more.
const POINTS: usize = 1500;
/// Bars of the histogram over [−1, 1].
const BARS: usize = 40;

const COLOURS: [RGBColor; 6] = [
    RGBColor(31, 95, 175),
    RGBColor(210, 90, 20),
    RGBColor(60, 140, 70),
    RGBColor(140, 80, 160),
    RGBColor(120, 120, 120),
    RGBColor(180, 40, 60),
];

/// A named line.
pub struct Line {
    /// What the legend says.
    pub name: String,
    /// Points in the order of x.
    pub points: Vec<(f64, f64)>,
}

/// Lines over a common x axis.
pub fn lines(lines: &[Line], x: &str, y: &str) -> Result<String> {
    let mut svg = String::new();
    draw_lines(&mut svg, lines, x, y).map_err(|error| undrawn(&*error))?;
    Ok(svg)
}

/// How often Δ falls into each of 40 bars between −1 and 1.
pub fn delta_histogram(deltas: &[f64]) -> Result<String> {
    let mut svg = String::new();
    draw_histogram(&mut svg, deltas).map_err(|error| undrawn(&*error))?;
    Ok(svg)
}

fn undrawn(error: &dyn std::error::Error) -> Error {
    Error::Data(format!("a picture cannot be drawn: {error}"))
}

fn draw_lines(
    svg: &mut String,
    lines: &[Line],
    x: &str,
    y: &str,
) -> Result<(), Box<dyn std::error::Error>> {
    let finite = |line: &Line| -> Vec<(f64, f64)> {
        let points = line.points.iter().copied().filter(|(x, y)| x.is_finite() && y.is_finite());
        thin(points.collect())
    };
    let lines: Vec<(&str, Vec<(f64, f64)>)> =
        lines.iter().map(|line| (line.name.as_str(), finite(line))).collect();
    let all = || lines.iter().flat_map(|(_, points)| points);
    let range = |values: &mut dyn Iterator<Item = f64>| {
        let (low, high) =
            values.fold((f64::MAX, f64::MIN), |(a, b), value| (a.min(value), b.max(value)));
        if low <= high { (low, high) } else { (0.0, 1.0) }
    };
    let (first, last) = range(&mut all().map(|point| point.0));
    let (low, high) = range(&mut all().map(|point| point.1));
    let margin = (0.05 * (high - low)).max(1e-3 * high.abs().max(1e-3));
    let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .margin(16)
        .x_label_area_size(44)
        .y_label_area_size(70)
        // Room above the lines for their names.
        .build_cartesian_2d(first..last.max(first + 1.0), low - margin..high + 5.0 * margin)?;
    chart
        .configure_mesh()
        // Steps and rounds are whole; the places between them need no label.
        .x_label_formatter(&|x| match x.fract() == 0.0 {
            true => format!("{x:.0}"),
            false => String::new(),
        })
        .light_line_style(WHITE)
        .bold_line_style(RGBColor(230, 230, 230))
        .x_desc(x)
        .y_desc(y)
        .label_style(("sans-serif", 14))
        .axis_desc_style(("sans-serif", 15))
        .draw()?;
    for (i, (name, points)) in lines.iter().enumerate() {
        let colour = COLOURS[i % COLOURS.len()];
        chart
            .draw_series(LineSeries::new(points.iter().copied(), colour.stroke_width(2)))?
            .label(*name)
            .legend(move |(x, y)| {
                PathElement::new(vec![(x, y), (x + 20, y)], colour.stroke_width(2))
            });
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .background_style(WHITE.mix(0.85))
        .border_style(RGBColor(200, 200, 200))
        .label_font(("sans-serif", 14))
        .draw()?;
    root.present()?;
    Ok(())
}

fn draw_histogram(svg: &mut String, deltas: &[f64]) -> Result<(), Box<dyn std::error::Error>> {
    let mut counts = [0u32; BARS];
    for delta in deltas.iter().filter(|delta| delta.is_finite()) {
        let place = ((delta + 1.0) / 2.0 * BARS as f64).floor();
        counts[(place.max(0.0) as usize).min(BARS - 1)] += 1;
    }
    let most = counts.iter().copied().max().unwrap_or(0).max(1);
    let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .margin(16)
        .x_label_area_size(44)
        .y_label_area_size(60)
        .build_cartesian_2d(-1.0..1.0, 0.0..f64::from(most) * 1.05)?;
    chart
        .configure_mesh()
        .light_line_style(WHITE)
        .bold_line_style(RGBColor(230, 230, 230))
        .x_desc("Δ = reward of the chosen answer − reward of the rejected one")
        .y_desc("pairs")
        .label_style(("sans-serif", 14))
        .axis_desc_style(("sans-serif", 15))
        .draw()?;
    let width = 2.0 / BARS as f64;
    chart.draw_series(counts.iter().enumerate().filter(|(_, count)| **count > 0).map(
        |(i, count)| {
            let left = -1.0 + i as f64 * width;
            // Pairs whose labels disagree with the reward stand out.
            let colour = if left < -1e-9 { COLOURS[1] } else { COLOURS[0] };
            Rectangle::new([(left, 0.0), (left + 0.9 * width, f64::from(*count))], colour.filled())
        },
    ))?;
    root.present()?;
    Ok(())
}

fn thin(points: Vec<(f64, f64)>) -> Vec<(f64, f64)> {
    let step = points.len().div_ceil(POINTS).max(1);
    points.into_iter().step_by(step).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_are_drawn_of_anything() {
        for points in
            [vec![], vec![(1.0, f64::NAN)], vec![(1.0, 2.0)], vec![(1.0, 5.0), (2.0, 5.0)]]
        {
            let svg = lines(&[Line { name: "chosen".into(), points }], "step", "log p").unwrap();
            assert!(svg.contains("</svg>") && !svg.contains("NaN") && svg.contains("chosen"));
        }
        for deltas in [&[][..], &[-1.0, 1.0, 0.0, f64::NAN], &[0.5; 9]] {
            let svg = delta_histogram(deltas).unwrap();
            assert!(svg.contains("</svg>") && !svg.contains("NaN"));
        }
    }
}
