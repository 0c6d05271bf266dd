//! Charts as SVG, readable on a light and on a dark page.

use std::fmt::Write;

/// One small log-log chart.
pub struct Panel<'a> {
    /// What is drawn, above the chart.
    pub title: &'a str,
    /// Its lines.
    pub lines: Vec<Line<'a>>,
}

/// One line of a chart.
pub struct Line<'a> {
    /// Label, written beside the last point.
    pub name: &'a str,
    /// Whether it is the subject (coloured) or what it is compared with (grey).
    pub subject: bool,
    /// Points, x and y both above zero, x ascending.
    pub points: Vec<(f64, f64)>,
}

/// How values are written on the axes.
pub struct Axes {
    /// A value of x.
    pub x: fn(f64) -> String,
    /// A value of y (a power of ten).
    pub y: fn(f64) -> String,
    /// What x is.
    pub x_title: &'static str,
}

const WIDTH: f64 = 300.0;
const HEIGHT: f64 = 300.0;
const LEFT: f64 = 62.0;
const RIGHT: f64 = 58.0;
const TOP: f64 = 96.0;
const BOTTOM: f64 = 52.0;

/// Colours and type for every drawing of the project. The colour scheme follows the reader's;
/// plain class rules, no variables, so that simple viewers draw it too.
pub const STYLE: &str = "\
<style>\
svg{font-family:ui-sans-serif,system-ui,-apple-system,'Segoe UI',Roboto,sans-serif}\
.title{font-size:17px;font-weight:650}.head{font-size:13px;font-weight:600}.small{font-size:11px}\
.subject-text{font-size:12px;font-weight:650}.other-text{font-size:12px}\
.grid{stroke-width:1}.subject{fill:none;stroke-width:2.5}.other{fill:none;stroke-width:2}\
.paper{fill:#ffffff}.title,.head{fill:#0f172a}.small{fill:#64748b}.grid{stroke:#e2e8f0}\
.subject{stroke:#0d9488}.subject-text,.subject-dot{fill:#0d9488}\
.other{stroke:#94a3b8}.other-text,.other-dot{fill:#94a3b8}\
@media(prefers-color-scheme:dark){\
.paper{fill:#0b1120}.title,.head{fill:#e2e8f0}.small{fill:#94a3b8}.grid{stroke:#1e293b}\
.subject{stroke:#2dd4bf}.subject-text,.subject-dot{fill:#2dd4bf}\
.other{stroke:#64748b}.other-text,.other-dot{fill:#94a3b8}}\
</style>";

/// Panels side by side under one title and one line of explanation.
pub fn panels(title: &str, note: &str, axes: &Axes, panels: &[Panel]) -> String {
    let step = LEFT + WIDTH + RIGHT;
    let (width, height) = (step * panels.len() as f64, TOP + HEIGHT + BOTTOM);
    let mut out = open(width, height, title);
    text(&mut out, 24.0, 34.0, "title", "start", title);
    text(&mut out, 24.0, 54.0, "small", "start", note);
    for (i, panel) in panels.iter().enumerate() {
        draw_panel(&mut out, axes, panel, step * i as f64 + LEFT);
    }
    out.push_str("</svg>\n");
    out
}

/// The opening tag, styles and paper of a drawing.
pub fn open(width: f64, height: f64, label: &str) -> String {
    let label = escape(label);
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width:.0} {height:.0}\" \
         width=\"{width:.0}\" height=\"{height:.0}\" role=\"img\" aria-label=\"{label}\">\n\
         {STYLE}\n<rect class=\"paper\" width=\"100%\" height=\"100%\" rx=\"12\"/>\n"
    )
}

/// One piece of text; `anchor` is `start`, `middle` or `end`.
pub fn text(out: &mut String, x: f64, y: f64, class: &str, anchor: &str, text: &str) {
    let text = escape(text);
    let _ = writeln!(
        out,
        "<text x=\"{x:.1}\" y=\"{y:.1}\" class=\"{class}\" text-anchor=\"{anchor}\">{text}</text>"
    );
}

/// Text safe inside an element or an attribute; control characters are dropped.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            c if c.is_control() => {}
            c => out.push(c),
        }
    }
    out
}

fn draw_panel(out: &mut String, axes: &Axes, panel: &Panel, left: f64) {
    text(out, left, TOP - 14.0, "head", "start", panel.title);
    let points = || panel.lines.iter().flat_map(|l| l.points.iter().copied());
    let (Some(x), Some(y)) = (range(points().map(|p| p.0)), range(points().map(|p| p.1))) else {
        text(out, left, TOP + 20.0, "small", "start", "not measured");
        return;
    };
    let y = (y.0.log10().floor(), y.1.log10().ceil().max(y.0.log10().floor() + 1.0));
    let x = (x.0.log2(), x.1.log2().max(x.0.log2() + 1.0));
    let at = |px: f64, py: f64| {
        (
            left + (px.log2() - x.0) / (x.1 - x.0) * WIDTH,
            TOP + (y.1 - py.log10()) / (y.1 - y.0) * HEIGHT,
        )
    };

    for exponent in (y.0 as i32)..=(y.1 as i32) {
        let value = 10f64.powi(exponent);
        let (_, py) = at(x.0.exp2(), value);
        let right = left + WIDTH;
        let _ = writeln!(
            out,
            "<line class=\"grid\" x1=\"{left:.1}\" x2=\"{right:.1}\" y1=\"{py:.1}\" y2=\"{py:.1}\"/>"
        );
        text(out, left - 8.0, py + 4.0, "small", "end", &(axes.y)(value));
    }
    let mut ticks: Vec<f64> = points().map(|p| p.0).collect();
    ticks.sort_by(f64::total_cmp);
    ticks.dedup();
    for tick in ticks {
        let (px, _) = at(tick, 1.0);
        text(out, px, TOP + HEIGHT + 18.0, "small", "middle", &(axes.x)(tick));
    }
    text(out, left + WIDTH / 2.0, TOP + HEIGHT + 38.0, "small", "middle", axes.x_title);

    let last = |line: &Line| line.points.last().map(|&(px, py)| at(px, py));
    let ends: Vec<Option<(f64, f64)>> = panel.lines.iter().map(last).collect();
    for (line, end) in panel.lines.iter().zip(&ends) {
        draw_line(out, line, at);
        let Some((x, y)) = *end else { continue };
        let class = if line.subject { "subject-text" } else { "other-text" };
        // Labels of lines that end close together step aside.
        let near = ends.iter().flatten().find(|(_, other)| *other != y && (other - y).abs() < 14.0);
        let aside = near.map_or(0.0, |(_, other)| (14.0 - (other - y).abs()) / 2.0);
        let aside = if near.is_some_and(|(_, other)| *other > y) { -aside } else { aside };
        text(out, x + 9.0, y + 4.0 + aside, class, "start", line.name);
    }
}

fn draw_line(out: &mut String, line: &Line, at: impl Fn(f64, f64) -> (f64, f64)) {
    let class = if line.subject { "subject" } else { "other" };
    let mut path = String::new();
    for (i, &(px, py)) in line.points.iter().enumerate() {
        let (x, y) = at(px, py);
        let _ = write!(path, "{}{x:.1} {y:.1}", if i == 0 { "M" } else { "L" });
    }
    let _ = writeln!(out, "<path class=\"{class}\" d=\"{path}\"/>");
    for &(px, py) in &line.points {
        let (x, y) = at(px, py);
        let _ =
            writeln!(out, "<circle class=\"{class}-dot\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3.5\"/>");
    }
}

fn range(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    let usable = values.filter(|v| v.is_finite() && *v > 0.0);
    usable.fold(None, |seen, v| match seen {
        None => Some((v, v)),
        Some((low, high)) => Some((low.min(v), high.max(v))),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chart(points: Vec<(f64, f64)>) -> String {
        let axes = Axes { x: |v| v.to_string(), y: |v| v.to_string(), x_title: "tokens" };
        let lines = vec![Line { name: "NSA <new>", subject: true, points }];
        panels("a & b", "note", &axes, &[Panel { title: "forward", lines }])
    }

    #[test]
    fn charts_stay_inside_their_frame_and_escape_names() {
        let svg = chart(vec![(1024.0, 0.02), (16384.0, 3.0)]);
        assert!(svg.contains("NSA &lt;new&gt;") && svg.contains("a &amp; b"));
        assert!(!svg.contains("NaN") && !svg.contains("inf"));
        let dots = svg.lines().filter(|l| l.starts_with("<circle"));
        for dot in dots {
            let number = |key: &str| -> f64 {
                let rest = dot.split(&format!("{key}=\"")).nth(1).unwrap();
                rest.split('"').next().unwrap().parse().unwrap()
            };
            assert!((LEFT..=LEFT + WIDTH).contains(&number("cx")), "{dot}");
            assert!((TOP..=TOP + HEIGHT).contains(&number("cy")), "{dot}");
        }
    }

    #[test]
    fn one_point_or_none_is_drawn_without_dividing_by_zero() {
        assert!(!chart(vec![(1024.0, 0.02)]).contains("NaN"));
        assert!(chart(Vec::new()).contains("not measured"));
    }
}
