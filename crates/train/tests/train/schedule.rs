//! Learning rates, step by step.

use tercet_train::RunConfig;
use tercet_train::schedule::Schedule;

fn schedule(text: &str) -> Schedule {
    let model = "[model]\nhidden_size = 8\nnum_hidden_layers = 1\nnum_attention_heads = 1\n";
    let data = "[data]\nvocab_size = 300\ncontext = 8\n";
    let train = format!("[train]\nbatch_tokens = 8\n{text}");
    let config = format!("output = 'x'\n{model}{data}{train}");
    let config = RunConfig::parse(&config, &[]).unwrap();
    Schedule::new(&config.train, config.steps())
}

fn close(found: f64, expected: f64) {
    assert!((found - expected).abs() <= 1e-15, "{found}, expected {expected}");
}

#[test]
fn cosine_rises_to_the_peak_and_ends_at_the_final_share() {
    let s = schedule("steps = 110\nwarmup = 10\nlr = 1.0\nfinal_lr = 0.1\nschedule = 'cosine'");
    close(s.lr(0), 0.1);
    close(s.lr(9), 1.0);
    // A quarter of the way through the half-cosine: 0.1 + 0.9 · (1 + cos π/4)/2.
    close(s.lr(34), 0.1 + 0.45 * (1.0 + std::f64::consts::FRAC_1_SQRT_2));
    close(s.lr(59), 0.55);
    close(s.lr(109), 0.1);
    assert!((10..109).all(|step| s.lr(step + 1) < s.lr(step)));
}

#[test]
fn wsd_is_flat_and_then_falls_in_a_straight_line() {
    let s = schedule(
        "steps = 100\nwarmup = 4\nlr = 2.0\nfinal_lr = 0.0\nschedule = 'wsd'\ndecay = 0.2",
    );
    close(s.lr(1), 1.0);
    assert!((3..80).all(|step| s.lr(step) == 2.0));
    close(s.lr(80), 2.0 * 0.95);
    close(s.lr(89), 1.0);
    close(s.lr(99), 0.0);
}

#[test]
fn short_runs_and_odd_shares_stay_finite() {
    for text in [
        "steps = 1\nwarmup = 100",
        "steps = 1\nwarmup = 0",
        "steps = 3\nwarmup = 3",
        "steps = 5\nwarmup = 0\nschedule = 'wsd'\ndecay = 1.0",
        "steps = 5\nwarmup = 5\nschedule = 'wsd'\ndecay = 1.0",
        "steps = 5\nwarmup = 0\nschedule = 'wsd'\ndecay = 0.0",
    ] {
        let s = schedule(text);
        assert!((0..8).all(|step| (0.0..=1e-3).contains(&s.lr(step))), "{text}");
    }
}
