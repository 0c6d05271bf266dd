//! What is run on a way, row by row.

use super::oracles::ORACLES;
use super::{
    Case, Fault, Floor, Golden, Random, Row, UNIT32, Way, check_same_choice, dims, distance,
    largest, reference, spec, two_times_rule, two_times_rule_attend,
};
use crate::cpu::Mask;
use crate::{Compressor, Dims, NsaSpec};

/// Random cases of the short suite, and of the long one.
const RANDOM: [usize; 2] = [12, 200];

/// Runs all suites on all ways; `each` hears of every row as it is done.
pub fn run(ways: &[Way], golden: &[Golden], long: bool, each: &mut dyn FnMut(Row)) {
    for case in golden {
        each(golden_reference(case));
        for way in ways {
            each(golden_case(way, case));
        }
    }
    for way in ways {
        shapes(way, each);
        for i in 0..RANDOM[usize::from(long)] {
            let case = random_case(i as u64);
            each(Row::of("property", format!("random {i} · {}", way.name), |tally| {
                two_times_rule(tally, way, &case, Floor::Magnitude, 2e-6)
            }));
        }
        facts(way, each);
    }
}

/// All facts, asked of one way.
pub fn facts(way: &Way, each: &mut dyn FnMut(Row)) {
    for oracle in ORACLES {
        let name = oracle.name.replace('_', " ");
        each(Row::of(oracle.suite, format!("{name} · {}", way.name), |tally| {
            (oracle.check)(way, tally)
        }));
    }
}

/// The float64 reference against a golden case.
///
/// The files hold float64 results rounded to f32: that rounding, and 1e-12 for another order of
/// summation, relative to the largest value but at least to 1. (The inputs are of that size, and
/// what is added up may cancel: shifting all keys alike moves no softmax, so that `d_phi_k_pe` of a
/// linear φ is zero but for rounding.)
pub fn golden_reference(golden: &Golden) -> Row {
    Row::of("golden", format!("{} · reference", golden.name), |tally| {
        let got = reference(&golden.case)?;
        if got.indices != golden.indices {
            return Err(Fault("other indices than the golden ones".into()));
        }
        for (name, x) in &golden.expected {
            let want: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
            let size = largest(want.iter().filter(|x| x.is_finite()));
            let allowed = UNIT32 * size + 1e-12 * size.max(1.0);
            tally.hold(name, distance(got.get(name), &want), allowed);
        }
        Ok(())
    })
}

/// A way on the inputs of a golden case, by the 2× rule; and its blocks are the golden ones but for
/// near-ties.
pub fn golden_case(way: &Way, golden: &Golden) -> Row {
    Row::of("golden", format!("{} · {}", golden.name, way.name), |tally| {
        two_times_rule(tally, way, &golden.case, Floor::Storage, 1e-6)?;
        if way.storage != super::Storage::F32 {
            return Ok(());
        }
        let case = golden.case.clone().forward_only();
        let keys = reference(&case)?.get("compressed_k").to_vec();
        let got = (way.run)(&case)?;
        let what = "golden blocks";
        check_same_choice(what, &case, &keys, &golden.indices, &got.indices, 1e-6).map(drop)
    })
}

/// A row of the 2× rule.
fn twice(way: &Way, what: &str, case: &Case) -> Row {
    Row::of("property", format!("{what} · {}", way.name), |tally| {
        two_times_rule(tally, way, case, Floor::Magnitude, 1e-6)
    })
}

/// Group sizes, dimensions, masks, and the paper's spec.
fn shapes(way: &Way, each: &mut dyn FnMut(Row)) {
    for (heads, kv_heads) in GROUPS {
        let spec = spec([8, 4, 16, 4, 24], Compressor::Linear);
        let case = Case::random(&spec, dims(heads, kv_heads, 16, 12), &[90, 5, 40], 60);
        each(twice(way, &format!("{heads} heads of {kv_heads}"), &case));
    }
    for (d, v) in DIMS {
        let spec = spec([8, 4, 16, 4, 24], Compressor::Mean);
        let case = Case::random(&spec, dims(4, 2, d, v), &[100], 61);
        each(twice(way, &format!("dims {d}/{v}"), &case));
    }
    for d in [dims(4, 2, 64, 64), dims(15, 1, 19, 33), dims(2, 2, 192, 128), dims(64, 1, 8, 8)] {
        let spec = spec([8, 4, 16, 4, 24], Compressor::Mean);
        let case = Case::random(&spec, d, &[0, 1, 150, 33], 62);
        for (name, mask) in MASKS {
            let Dims { heads, kv_heads, key_dim, value_dim } = d;
            let what = format!("{name}, {heads} heads of {kv_heads}, dims {key_dim}/{value_dim}");
            each(Row::of("property", format!("{what} · {}", way.name), |tally| {
                two_times_rule_attend(tally, way, &case, mask)
            }));
        }
    }
}

/// Query heads and key/value heads whose groups are 1 to 64.
pub const GROUPS: [(usize, usize); 5] = [(3, 3), (6, 2), (15, 1), (64, 1), (30, 2)];

/// Key and value dimensions, odd ones among them.
pub const DIMS: [(usize, usize); 7] =
    [(192, 128), (256, 256), (256, 1), (1, 256), (5, 7), (64, 128), (33, 65)];

/// Masks of plain attention.
pub const MASKS: [(&str, Mask); 4] = [
    ("dense", Mask::Causal),
    ("window 1", Mask::Window(1)),
    ("window 40", Mask::Window(40)),
    ("endless window", Mask::Window(1 << 40)),
];

/// A valid spec of small numbers, with a shape and lengths; a pure function of the seed.
pub fn random_case(seed: u64) -> Case {
    let mut random = Random(seed.wrapping_mul(0x2545_f491_4f6c_dd1d) ^ 0x7e3c);
    let mut pick = |from: usize, to: usize| from + random.next() as usize % (to - from);
    let (stride, blocks, more) = (pick(1, 6), pick(1, 4), pick(0, 3));
    let (initial, local) = (pick(0, 3), pick(0, 4));
    let spec = NsaSpec {
        compress_block: stride * blocks,
        compress_stride: stride,
        select_block: stride * (blocks + more),
        select_count: (initial + local).max(pick(1, 6)),
        select_initial: initial,
        select_local: local,
        window: pick(1, 40),
        compressor: [Compressor::Mean, Compressor::Linear, Compressor::Mlp][pick(0, 3)],
    };
    let (kv_heads, group) = (pick(1, 4), pick(1, 7));
    let dims =
        Dims { heads: kv_heads * group, kv_heads, key_dim: pick(1, 40), value_dim: pick(1, 40) };
    let lengths: Vec<usize> = (0..pick(1, 4)).map(|_| pick(0, 110)).collect();
    Case::random(&spec, dims, &lengths, seed)
}
