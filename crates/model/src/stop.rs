//! Stop texts over a stream: nothing of a stop text is ever shown, wherever pieces are cut.

/// Passes text on, holding back any end that could be the start of a stop text.
pub struct StopFilter<'s> {
    stops: &'s [String],
    held: String,
}

impl<'s> StopFilter<'s> {
    /// A filter for these texts, none of them empty.
    pub fn new(stops: &'s [String]) -> Self {
        Self { stops, held: String::new() }
    }

    /// Takes a piece; returns the text that can be shown and the stop text that came, if any.
    /// Of several, the one that ends first counts, then the longest.
    pub fn push(&mut self, piece: &str) -> (String, Option<String>) {
        self.held.push_str(piece);
        let found = self
            .stops
            .iter()
            .filter_map(|stop| self.held.find(stop.as_str()).map(|at| (at, stop)))
            .min_by_key(|(at, stop)| (at + stop.len(), *at));
        if let Some((at, stop)) = found {
            let shown = self.held[..at].to_owned();
            self.held.clear();
            return (shown, Some(stop.clone()));
        }
        let keep = self.stops.iter().map(|stop| open_end(&self.held, stop)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        (std::mem::replace(&mut self.held, rest), None)
    }

    /// What was held back, when no more text comes.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Bytes at the end of `text` that begin `stop`.
fn open_end(text: &str, stop: &str) -> usize {
    let begins = |&(at, _): &(usize, char)| text.ends_with(&stop[..at]);
    stop.char_indices().rev().find(begins).map_or(0, |(at, _)| at)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (Vec<String>, Option<String>) {
        let stops: Vec<String> = stops.iter().map(|s| s.to_string()).collect();
        let mut filter = StopFilter::new(&stops);
        let mut shown = Vec::new();
        for piece in pieces {
            let (text, stopped) = filter.push(piece);
            shown.push(text);
            if stopped.is_some() {
                return (shown, stopped);
            }
        }
        shown.push(filter.finish());
        (shown, None)
    }

    #[test]
    fn a_stop_text_cut_in_pieces_is_never_shown() {
        let (shown, stopped) = run(&["\n\nUser:"], &["Hi", "\n", "\nUs", "er: x"]);
        assert_eq!(shown, ["Hi", "", "", ""]);
        assert_eq!(stopped.as_deref(), Some("\n\nUser:"));
    }

    #[test]
    fn a_false_start_is_shown_once_it_is_known() {
        let (shown, stopped) = run(&["aab"], &["a", "a", "a", "c", "aa"]);
        assert_eq!(shown, ["", "", "a", "aac", "", "aa"]);
        assert_eq!(stopped, None);
    }

    #[test]
    fn multi_byte_stops_hold_back_whole_characters() {
        let (shown, stopped) = run(&["日本語"], &["x日", "本", "日本", "語y"]);
        assert_eq!(shown, ["x", "", "日本", ""]);
        assert_eq!(stopped.as_deref(), Some("日本語"));
    }

    #[test]
    fn the_stop_that_ends_first_counts() {
        let (shown, stopped) = run(&["cdef", "d"], &["abcdef"]);
        assert_eq!((shown[0].as_str(), stopped.as_deref()), ("abc", Some("d")));
    }
}
