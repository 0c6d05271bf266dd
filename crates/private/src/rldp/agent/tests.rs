//! The agent's losses against differences, what it learns, and what it refuses.

use super::super::mlp::tests::{against_differences, reference, wide};
use super::*;

/// Transitions with plain numbers in them.
fn batch(dims: (usize, usize), rows: usize) -> Vec<Transition> {
    let wave = |row: usize, i: usize| ((row * 7 + i * 3) as f32 * 0.61).sin();
    let vector = |row, from, count| (from..from + count).map(|i| wave(row, i)).collect();
    let transition = |row| Transition {
        state: vector(row, 0, dims.0),
        action: vector(row, 20, dims.1),
        reward: wave(row, 40),
        next: vector(row, 60, dims.0),
    };
    (0..rows).map(transition).collect()
}

#[test]
fn the_critics_gradient_is_the_slope_of_its_loss() {
    let critic = Mlp::new(5, 1, &mut Random::new(5, 0));
    let (batch, targets) = (batch((3, 2), 4), [0.5f32, -1.0, 2.0, 0.0]);
    let grads = critic_gradient(&critic, &batch, &targets);
    against_differences(&critic.params, &grads, |params| {
        let loss = |(t, y): (&Transition, &f32)| {
            let input = wide(&[&t.state[..], &t.action].concat());
            (reference(&critic, params, &input)[0] - f64::from(*y)).powi(2) / 4.0
        };
        batch.iter().zip(&targets).map(loss).sum()
    });
}

#[test]
fn the_actors_gradient_is_the_slope_of_its_loss() {
    let mut random = Random::new(6, 0);
    let actor = Mlp::new(3, 4, &mut random);
    let critics = [(); 2].map(|()| Mlp::new(5, 1, &mut random));
    let batch = batch((3, 2), 4);
    let noise: Vec<Vec<f32>> = batch.iter().map(|t| t.action.clone()).collect();
    let (grads, log_prob) = actor_gradient(&actor, &critics, 0.3, &batch, &noise);
    // From the definition, in f64: log(1 − tanh²) written as it stands.
    let row = |params: &[f64], t: &Transition, noise: &[f32]| {
        let heads = reference(&actor, params, &wide(&t.state));
        let (mut action, mut log_prob) = (Vec::new(), 0.0);
        for (i, &xi) in noise.iter().enumerate() {
            let (xi, log_std) = (f64::from(xi), heads[2 + i]);
            let a = (heads[i] + log_std.exp() * xi).tanh();
            let normal = -0.5 * xi * xi - log_std - 0.5 * (2.0 * std::f64::consts::PI).ln();
            log_prob += normal - (1.0 - a * a).ln();
            action.push(a);
        }
        let input = [&wide(&t.state)[..], &action].concat();
        let q = critics.each_ref().map(|c| reference(c, &wide(&c.params), &input)[0]);
        (log_prob, 0.3 * log_prob - q[0].min(q[1]))
    };
    let mean = |params: &[f64], which: fn((f64, f64)) -> f64| {
        let rows = batch.iter().zip(&noise).map(|(t, noise)| which(row(params, t, noise)));
        rows.sum::<f64>() / 4.0
    };
    let exact = mean(&wide(&actor.params), |row| row.0);
    assert!((f64::from(log_prob) - exact).abs() < 1e-5, "{log_prob} {exact}");
    against_differences(&actor.params, &grads, |params| mean(params, |row| row.1));
}

#[test]
fn an_update_moves_each_part_as_its_formula_says() {
    let mut agent = Agent::new(3, 2, 8).unwrap();
    batch((3, 2), 9).into_iter().for_each(|transition| agent.replay.push(transition));
    // Critics that differ, and from their slow copies, so that it matters which is taken.
    agent.critics[1].params.iter_mut().for_each(|w| *w *= 1.5);
    let before = agent.clone();
    agent.update(&mut Random::new(1, 0));

    // The same draws, the targets in f64.
    let mut random = Random::new(1, 0);
    let batch = before.replay.sample(BATCH, &mut random);
    assert_eq!(batch.len(), 9);
    let actor = |params: &[f64], state: &[f32]| reference(&before.actor, params, &wide(state));
    let targets = batch.iter().map(|t| {
        let heads = actor(&wide(&before.actor.params), &t.next);
        let (mut action, mut log_prob) = (Vec::new(), 0.0);
        for (i, xi) in random.normals(2).into_iter().map(f64::from).enumerate() {
            let a = (heads[i] + heads[2 + i].exp() * xi).tanh();
            log_prob -= 0.5 * xi * xi + heads[2 + i] + 0.5 * (2.0 * std::f64::consts::PI).ln();
            log_prob -= (1.0 - a * a).ln();
            action.push(a);
        }
        let input = [&wide(&t.next)[..], &action].concat();
        let q = before.slow.each_ref().map(|q| reference(q, &wide(&q.params), &input)[0]);
        (f64::from(t.reward) + 0.99 * (q[0].min(q[1]) - 0.2 * log_prob)) as f32
    });
    let targets: Vec<f32> = targets.collect();
    for (at, critic) in before.critics.iter().enumerate() {
        let mut expected = critic.clone();
        let mut adam = before.adams[1 + at].clone();
        adam.step(&mut expected.params, &critic_gradient(critic, &batch, &targets));
        let pairs = expected.params.iter().zip(&agent.critics[at].params);
        // Adam's first step is 3e-4 times g/(|g| + 1e-8): gradients of 1e-6 and less may differ.
        let off = pairs.filter(|(e, a)| (*e - *a).abs() > 1e-6).count();
        assert!(off < 20, "critic {at}: {off}");
    }
    for at in 0..2 {
        let weights = before.slow[at].params.iter().zip(&agent.critics[at].params);
        for ((slow, fast), after) in weights.zip(&agent.slow[at].params) {
            assert!((slow + 0.005 * (fast - slow) - after).abs() < 1e-7);
        }
    }
    // A fresh policy is far from certain: its entropy is above −2, so the temperature falls, by
    // Adam's first step.
    let moved = agent.log_temperature[0] - before.log_temperature[0];
    assert!((moved + 3e-4).abs() < 1e-6, "{moved}");
}

/// Mean reward of decisions `from..to` on a task that maps (state, action) to (reward, next).
fn play(
    agent: &mut Agent,
    task: impl Fn(&[f32], &[f32]) -> (f32, Vec<f32>),
    start: Vec<f32>,
    (from, to): (usize, usize),
) -> f32 {
    let (mut state, mut reward, mut sum) = (start, None, 0.0);
    for decision in 0..to {
        let action = agent.decide(&state, reward).unwrap();
        let (r, next) = task(&state, &action);
        sum += if decision >= from { r } else { 0.0 };
        (state, reward) = (next, Some(r));
    }
    sum / (to - from) as f32
}

/// A bandit with one arm per number of [−1, 1]: the best is 0.6, the mean of random ones −0.693.
fn bandit(_: &[f32], action: &[f32]) -> (f32, Vec<f32>) {
    (-(action[0] - 0.6).powi(2), vec![1.0])
}

#[test]
fn it_learns_which_arm_pays() {
    // Even draws earn E[−(a − 0.6)²] = −(1/3 + 0.36) = −0.693. Margin: the agent must lose less
    // than a third of that, for every one of three seeds.
    for seed in [1, 2, 3] {
        let mut agent = Agent::new(1, 1, seed).unwrap();
        let earned = play(&mut agent, bandit, vec![1.0], (500, 600));
        println!("seed {seed}: {earned}");
        assert!(earned > -0.231, "seed {seed}: {earned}");
    }
}

#[test]
fn it_learns_to_hold_a_point() {
    // x′ = 0.95·x + 0.5·a + a push that changes sign slowly; paid −x². Nothing done or random
    // actions leave x where the push takes it.
    let task = |state: &[f32], action: &[f32]| {
        let push = if state[1] > 0.0 { 0.25 } else { -0.25 };
        let x = (0.95 * state[0] + 0.5 * action[0] + push).clamp(-3.0, 3.0);
        let clock = if state[1].abs() >= 1.0 { -0.1 * state[1].signum() } else { state[1] * 1.5 };
        (-x * x, vec![x, clock])
    };
    let mut random = Random::new(9, 0);
    let (mut state, mut lost) = (vec![0.0, 0.1], 0.0);
    for _ in 0..1000 {
        let (r, next) = task(&state, &[random.centred()]);
        (state, lost) = (next, lost + r / 1000.0);
    }
    for seed in [1, 2, 3] {
        let mut agent = Agent::new(2, 1, seed).unwrap();
        let earned = play(&mut agent, task, vec![0.0, 0.1], (700, 800));
        println!("seed {seed}: {earned} against {lost}");
        // Margin: less than half of what random actions lose.
        assert!(earned > 0.5 * lost, "seed {seed}: {earned} against {lost}");
    }
}

#[test]
fn the_next_state_is_what_the_decision_led_to() {
    let mut agent = Agent::new(2, 1, 7).unwrap();
    let mut states = Vec::new();
    let mut rewards = Vec::new();
    for i in 0..20u8 {
        let reward = (i > 0).then(|| f32::from(i) * 0.1);
        rewards.extend(reward);
        agent.decide(&[f32::from(i), (f32::from(i) * 0.3).sin()], reward).unwrap();
        states.push(agent.open.clone().unwrap());
    }
    for (i, transition) in agent.replay.transitions().iter().enumerate() {
        assert_eq!((&transition.state, &transition.action), (&states[i].0, &states[i].1));
        assert_eq!(transition.next, states[i + 1].0);
        assert_eq!(transition.reward, rewards[i]);
        assert_ne!(transition.next, transition.state);
    }
    assert_eq!(agent.replay.transitions().len(), 19);
}

#[test]
fn it_goes_on_from_its_bytes_with_the_same_bits() {
    let state = |i: usize| [i as f32, (i as f32 * 0.7).sin(), -1.0];
    let reward = |i: usize| (i > 0).then(|| (i as f32 * 0.3).cos());
    let mut whole = Agent::new(3, 4, 11).unwrap();
    let actions: Vec<_> = (0..60).map(|i| whole.decide(&state(i), reward(i)).unwrap()).collect();
    // Before anything, in the warm-up, at its end, later.
    for stop in [0, 1, 3, 5, 33] {
        let mut first = Agent::new(3, 4, 11).unwrap();
        for i in 0..stop {
            first.decide(&state(i), reward(i)).unwrap();
        }
        let mut second = Agent::from_bytes(&first.to_bytes().unwrap()).unwrap();
        assert_eq!(second, first);
        for (i, action) in actions.iter().enumerate().skip(stop) {
            assert_eq!(second.decide(&state(i), reward(i)).as_ref(), Ok(action), "{stop} {i}");
        }
        assert_eq!(second.to_bytes().unwrap(), whole.to_bytes().unwrap());
    }
    assert!(actions.iter().flatten().all(|a| (-1.0..=1.0).contains(a)));
    let other = Agent::new(3, 4, 12).unwrap().decide(&state(0), None).unwrap();
    assert_ne!(other, actions[0], "the seed decides");
}

#[test]
fn what_is_not_a_number_moves_nothing() {
    let mut agent = Agent::new(2, 1, 1).unwrap();
    assert!(agent.decide(&[0.0, 0.0], Some(1.0)).is_err(), "a reward before any decision");
    agent.decide(&[0.5, 0.5], None).unwrap();
    let before = agent.to_bytes().unwrap();
    for (state, reward) in [
        (vec![f32::NAN, 0.0], Some(0.0)),
        (vec![0.0, f32::INFINITY], Some(0.0)),
        (vec![0.0], Some(0.0)),
        (vec![0.0, 0.0, 0.0], Some(0.0)),
        (vec![0.0, 0.0], Some(f32::NAN)),
        (vec![0.0, 0.0], Some(f32::NEG_INFINITY)),
        (vec![0.0, 0.0], Some(1e4)),
        (vec![0.0, 0.0], None),
    ] {
        assert!(agent.decide(&state, reward).is_err(), "{state:?} {reward:?}");
        assert_eq!(agent.to_bytes().unwrap(), before);
    }
    // The largest numbers that are ones do no harm.
    for i in 0..40 {
        let sign = if i % 2 == 0 { 1.0 } else { -1.0 };
        agent.decide(&[f32::MAX * sign, f32::MIN_POSITIVE], Some(1e3 * sign)).unwrap();
    }
    for dims in [(0, 1), (1, 0), (4097, 1), (1, usize::MAX)] {
        assert!(Agent::new(dims.0, dims.1, 0).is_err());
    }
}

#[test]
fn bytes_that_no_agent_wrote_are_refused() {
    let mut agent = Agent::new(2, 1, 1).unwrap();
    for i in 0..8u8 {
        agent.decide(&[0.1, f32::from(i)], (i > 0).then_some(0.5)).unwrap();
    }
    let good = agent.to_bytes().unwrap();
    for length in [0, 1, 31, 32, 33, 100, good.len() - 1] {
        assert!(Agent::from_bytes(&good[..length]).is_err(), "{length}");
    }
    // With a hash that fits: what was written over must be seen by what it says.
    let body: serde_json::Value = serde_json::from_slice(&good[..good.len() - SEAL]).unwrap();
    let sealed = |body: &[u8]| [body, &Sha256::digest(body)[..]].concat();
    assert_eq!(Agent::from_bytes(&sealed(&serde_json::to_vec(&body).unwrap())), Ok(agent));
    for (place, value) in [
        ("/dims/0", "3"),
        ("/dims/1", "18446744073709551615"),
        ("/dims/0", "0"),
        ("/seed", "-1"),
        ("/adams/1/steps", "18446744073709551615"),
        ("/seen/seen", "9"),
        ("/seen/mean", "[]"),
        ("/seen/mean/0", "1e300"),
        ("/seen/spread/0", "-1"),
        ("/actor/inputs", "3"),
        ("/actor/outputs", "1e400"),
        ("/actor/params/7", "1e39"),
        ("/actor/params/7", "null"),
        ("/adams/0/second/7", "-1e-3"),
        ("/adams/3/first", "[]"),
        ("/critics/1/params", "[]"),
        ("/critics/1", "null"),
        ("/slow/0/params/5", "-1e39"),
        ("/slow/0/inputs", "9"),
        ("/log_temperature", "[]"),
        ("/log_temperature/0", "1e39"),
        ("/replay/0/next", "[1]"),
        ("/replay/0/action", "[]"),
        ("/replay/0/reward", "1e39"),
        ("/open", "null"),
        ("/open/0", "[1]"),
        ("/decisions", "0"),
    ] {
        // As text, since no JSON number that is kept as such is out of its range.
        let mut marked = body.clone();
        *marked.pointer_mut(place).expect(place) = serde_json::json!("\u{1}");
        let text = serde_json::to_string(&marked).unwrap().replace("\"\\u0001\"", value);
        let refused = Agent::from_bytes(&sealed(text.as_bytes()));
        assert!(matches!(refused, Err(Error::Controller(_))), "{place} {value}");
    }
}
