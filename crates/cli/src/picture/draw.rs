//! The project's picture: what one real query reads through the three branches.

use std::fmt::Write;

use tercet_attention::NsaSpec;

use crate::{human, svg};

/// What one query of one head read.
pub struct Reading<'a> {
    /// Blocks, counts and window.
    pub spec: &'a NsaSpec,
    /// The query's position (0-based); it sees tokens 0 to this one.
    pub position: usize,
    /// Attention over the visible compressed blocks, averaged over the group's heads; sums to 1.
    pub compressed: &'a [f32],
    /// Blocks selected, ascending.
    pub selected: &'a [usize],
    /// Gates of the three branches, averaged over the group's heads.
    pub gates: [f32; 3],
    /// Where the query comes from, in words.
    pub caption: &'a str,
    /// The text just before the query.
    pub query_text: &'a str,
    /// Selected blocks worth quoting, with their text.
    pub quotes: &'a [(usize, String)],
}

const WIDTH: f64 = 1000.0;
const LEFT: f64 = 196.0;
const RIGHT: f64 = 896.0;
const LANE: f64 = 92.0;
const TOP: f64 = 108.0;
const BAR: f64 = 46.0;

const STYLE: &str = "<style>\
.code{font:12px ui-monospace,'SF Mono',Menlo,Consolas,monospace;fill:#0f172a}\
.edge{stroke:#64748b;stroke-width:1;stroke-dasharray:3 4}.rest{fill:#e2e8f0}\
.cmp,.cmp-text{fill:#d97706}.slc,.slc-text{fill:#7c3aed}.win,.win-text{fill:#0d9488}\
.cmp-text,.slc-text,.win-text{font-size:14px;font-weight:650}\
@media(prefers-color-scheme:dark){.code{fill:#e2e8f0}.edge{stroke:#94a3b8}.rest{fill:#1e293b}\
.cmp,.cmp-text{fill:#fbbf24}.slc,.slc-text{fill:#a78bfa}.win,.win-text{fill:#2dd4bf}}\
</style>\n";

/// Draws a reading as SVG.
pub fn draw(reading: &Reading) -> String {
    let Reading { spec, position, .. } = *reading;
    let seen = position + 1;
    let quotes = reading.quotes.len() as f64;
    let height = TOP + 3.0 * LANE + 34.0 + 22.0 * (quotes + 1.0);
    let title = "What one query reads";
    let mut out = svg::open(WIDTH, height, title);
    out.push_str(STYLE);
    svg::text(&mut out, 24.0, 36.0, "title", "start", title);
    let read = read_tokens(reading);
    let note = format!(
        "{}. It sees {} tokens as {} summaries, and reads {} of them in full ({:.0} %).",
        reading.caption,
        human::grouped(seen as u64),
        reading.compressed.len(),
        human::grouped(read as u64),
        100.0 * read as f64 / seen as f64
    );
    svg::text(&mut out, 24.0, 58.0, "small", "start", &note);

    let x = |token: usize| LEFT + (RIGHT - LEFT) * token as f64 / seen as f64;
    lane(&mut out, 0, "cmp", "compressed", "a summary of every block", reading.gates[0]);
    lane(&mut out, 1, "slc", "selected", "the blocks that scored best", reading.gates[1]);
    lane(&mut out, 2, "win", "window", "the last tokens", reading.gates[2]);

    compressed_bars(&mut out, reading, x);
    let lane_top = TOP + LANE;
    for block in 0..spec.selection_blocks(seen) {
        let class = if reading.selected.contains(&block) { "slc" } else { "rest" };
        let end = ((block + 1) * spec.select_block).min(seen);
        block_rect(&mut out, class, x(block * spec.select_block), x(end), lane_top);
    }
    let lane_top = TOP + 2.0 * LANE;
    let start = seen.saturating_sub(spec.window);
    block_rect(&mut out, "rest", x(0), x(start), lane_top);
    block_rect(&mut out, "win", x(start), x(seen), lane_top);

    let foot = TOP + 3.0 * LANE - 18.0;
    let _ = writeln!(
        out,
        "<line class=\"edge\" x1=\"{RIGHT}\" x2=\"{RIGHT}\" y1=\"{:.1}\" y2=\"{foot:.1}\"/>",
        TOP - 12.0
    );
    svg::text(&mut out, LEFT, foot + 14.0, "small", "start", "token 0");
    svg::text(
        &mut out,
        RIGHT,
        foot + 14.0,
        "small",
        "end",
        &format!("the query, token {position}"),
    );

    let mut y = foot + 50.0;
    svg::text(&mut out, 24.0, y, "small", "start", "the query follows");
    svg::text(&mut out, LEFT, y, "code", "start", &one_line(reading.query_text, 96, true));
    for (block, text) in reading.quotes {
        y += 22.0;
        svg::text(&mut out, 24.0, y, "small", "start", &format!("it selected block {block}"));
        svg::text(&mut out, LEFT, y, "code", "start", &one_line(text, 96, false));
    }
    out.push_str("</svg>\n");
    out
}

/// Tokens that are read one by one: in a selected block, in the window, or both.
fn read_tokens(reading: &Reading) -> usize {
    let Reading { spec, position, selected, .. } = *reading;
    let seen = position + 1;
    let window = seen.saturating_sub(spec.window);
    (0..seen).filter(|t| *t >= window || selected.contains(&(t / spec.select_block))).count()
}

fn lane(out: &mut String, index: usize, class: &str, name: &str, what: &str, gate: f32) {
    let y = TOP + LANE * index as f64;
    svg::text(out, 24.0, y + BAR / 2.0, &format!("{class}-text"), "start", name);
    svg::text(out, 24.0, y + BAR / 2.0 + 16.0, "small", "start", what);
    svg::text(out, RIGHT + 16.0, y + BAR / 2.0 + 5.0, "small", "start", &format!("gate {gate:.2}"));
}

/// One bar a compressed block; its height is the square root of its share, so that small ones
/// can be seen.
fn compressed_bars(out: &mut String, reading: &Reading, x: impl Fn(usize) -> f64) {
    let spec = reading.spec;
    let largest = reading.compressed.iter().copied().fold(f32::MIN_POSITIVE, f32::max);
    for (i, &share) in reading.compressed.iter().enumerate() {
        let height = (BAR * f64::from((share / largest).max(0.0).sqrt())).max(1.5);
        let start = i * spec.compress_stride;
        let (left, right) = (x(start), x(start + spec.compress_stride));
        let _ = writeln!(
            out,
            "<rect class=\"cmp\" x=\"{left:.2}\" y=\"{:.2}\" width=\"{:.2}\" \
             height=\"{height:.2}\" rx=\"1\"/>",
            TOP + BAR - height,
            (right - left - 1.0).max(0.6),
        );
    }
}

fn block_rect(out: &mut String, class: &str, left: f64, right: f64, top: f64) {
    if right > left {
        let _ = writeln!(
            out,
            "<rect class=\"{class}\" x=\"{left:.2}\" y=\"{top:.2}\" width=\"{:.2}\" \
             height=\"{BAR}\" rx=\"3\"/>",
            (right - left - 1.5).max(0.6)
        );
    }
}

/// Text on one line of at most `most` characters, its end kept or its start.
fn one_line(text: &str, most: usize, keep_end: bool) -> String {
    let words: Vec<&str> = text.split_whitespace().collect();
    let line = words.join(" ");
    let count = line.chars().count();
    if count <= most {
        return line;
    }
    if keep_end {
        format!("…{}", line.chars().skip(count - most + 1).collect::<String>())
    } else {
        format!("{}…", line.chars().take(most - 1).collect::<String>())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_selected_block_is_drawn_and_read_tokens_are_counted_once() {
        let spec = NsaSpec { window: 100, ..NsaSpec::default() };
        let reading = Reading {
            spec: &spec,
            position: 299,
            compressed: &[0.25; 4],
            selected: &[0, 3, 4],
            gates: [0.1, 0.2, 0.3],
            caption: "a test",
            query_text: "fn main() {\n    x",
            quotes: &[(3, "struct <T>".into())],
        };
        // Blocks 0 (64 tokens) and 3 and 4 (192..300); the window 200..300 adds none.
        assert_eq!(read_tokens(&reading), 64 + 108);
        let svg = draw(&reading);
        assert_eq!(svg.matches("class=\"slc\"").count(), 3);
        assert_eq!(svg.matches("class=\"cmp\"").count(), 4);
        assert!(svg.contains("struct &lt;T&gt;") && svg.contains("fn main() { x"));
        assert!(!svg.contains("NaN"));
    }

    #[test]
    fn long_quotes_are_cut_at_the_right_end() {
        assert_eq!(one_line("abcdef", 4, true), "…def");
        assert_eq!(one_line("abcdef", 4, false), "abc…");
    }
}
