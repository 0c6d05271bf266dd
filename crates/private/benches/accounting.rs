//! `cargo bench -p tercet-private`: how long an answer takes.

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use tercet_private::accounting::calibrate::{self, Accountant};
use tercet_private::accounting::{Phase, pld, rdp};

fn accounting(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("accounting");
    group.sample_size(10);
    let long = [Phase::new(20.0, 0.02, 100_000).unwrap()];
    group.bench_function("pld, both bounds, T = 1e5", |b| {
        b.iter(|| pld::epsilon(black_box(&long), 1e-7));
    });
    // Rare and large losses: the widest range, the longest transforms.
    let rare = [Phase::new(1.0, 1e-5, 100_000).unwrap()];
    group.bench_function("pld, both bounds, T = 1e5, q = 1e-5", |b| {
        b.iter(|| pld::epsilon(black_box(&rare), 1e-6));
    });
    let orders = rdp::default_orders();
    group.bench_function("rdp, default orders", |b| {
        b.iter(|| rdp::epsilon(black_box(&long), 1e-7, &orders));
    });
    group.bench_function("sigma by pld, T = 3816", |b| {
        b.iter(|| calibrate::sigma(Accountant::Pld, black_box((4.0, 1e-5)), 64.0 / 81412.0, 3816));
    });
    group.finish();
}

criterion_group!(benches, accounting);
criterion_main!(benches);
