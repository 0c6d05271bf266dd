//! Medians of repeated runs.

use std::time::Instant;

/// How long to measure one thing.
#[derive(Clone, Copy)]
pub struct Effort {
    /// Seconds of repetition to aim for; at least three runs and at most a hundred are made.
    pub seconds: f64,
}

/// Runs of a thing whose first run took longer than this are not repeated.
const LONG: f64 = 8.0;

/// The median time in seconds of `work`, and the number of runs it is taken from. The first run
/// warms up and is not counted, unless it alone took very long.
pub fn median<E>(
    effort: Effort,
    mut work: impl FnMut() -> Result<(), E>,
) -> Result<(f64, usize), E> {
    let mut once = || -> Result<f64, E> {
        let start = Instant::now();
        work()?;
        Ok(start.elapsed().as_secs_f64())
    };
    let first = once()?;
    if first > LONG {
        return Ok((first, 1));
    }
    let mut times = Vec::new();
    let mut spent = 0.0;
    while times.len() < 3 || (spent < effort.seconds && times.len() < 100) {
        let time = once()?;
        spent += time;
        times.push(time);
    }
    times.sort_by(f64::total_cmp);
    Ok((times[times.len() / 2], times.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_run_is_not_counted_and_errors_come_through() {
        let mut runs = 0;
        let (time, counted) = median(Effort { seconds: 0.0 }, || {
            runs += 1;
            if runs == 1 {
                std::thread::sleep(std::time::Duration::from_millis(300));
            }
            Ok::<(), ()>(())
        })
        .unwrap();
        assert_eq!((runs, counted), (4, 3));
        assert!(time < 0.3, "{time}");
        assert_eq!(median(Effort { seconds: 1.0 }, || Err("no")), Err("no"));
    }
}
