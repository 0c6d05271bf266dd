"""Decode steps timed in graphs against the bytes they must read, and where their clocks go."""
import math
import pathlib
import tempfile

import torch

from steps import BANDWIDTH, Cache, Compiled, SOURCES, SPEC, Step, compile_all, compressed
from harness import compile_cubin, flush_l2  # noqa: E402


def floor_us(spec, lengths, kv, d, v, dense=False):
    keys = 0
    for n in lengths:
        keys += n if dense else compressed(spec, n) + min(n, spec["SELECT_COUNT"] * spec["SELECT_BLOCK"]) + min(n, spec["WINDOW"])
    return keys * kv * (d + v) * 2 / BANDWIDTH * 1e6


class Timing:
    """Caches of random numbers for a batch of one length."""

    def __init__(self, batch, length, heads=64, kv=4, d=128, v=128, spec=SPEC, dtype=torch.bfloat16, dense=False, sets=1):
        self.batch, self.length, self.heads, self.kv, self.d, self.v, self.spec, self.dtype = batch, length, heads, kv, d, v, spec, dtype
        self.dense, self.sets = dense, sets
        many = batch * sets
        self.q = torch.randn(batch, heads, d, device="cuda", dtype=dtype)
        self.gate = torch.rand(batch, heads, 3, device="cuda").to(dtype)
        self.out = torch.empty(batch, heads, v, device="cuda", dtype=dtype)
        self.positions = torch.full((batch,), length - 1, dtype=torch.int32, device="cuda")
        self.sequences = [torch.arange(i * batch, (i + 1) * batch, dtype=torch.int32, device="cuda") for i in range(sets)]
        self.slc = Cache(many, length, kv, d, v, dtype, 64, fill=None)
        self.cmp = self.win = None
        if not dense:
            self.cmp = Cache(many, compressed(spec, length), kv, d, v, dtype, None, fill=None)
            self.win = Cache(many, spec["WINDOW"] + 64, kv, d, v, dtype, None, ring=True, fill=None)

    def step(self, **how):
        spec = dict(self.spec, WINDOW=0) if self.dense else self.spec
        return Step(spec, self.heads, self.kv, self.d, self.v, self.dtype, self.length, dense=self.dense, **how)

    def time(self, repeats=30, **how):
        step = self.step(**how)
        runs = [step.bind(self.q, self.gate, self.out, self.positions, self.cmp, self.slc, self.win, None, s) for s in self.sequences]
        runs[0]()
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                for run in runs:
                    run()
        torch.cuda.synchronize()
        times = []
        for i in range(repeats + 3):
            flush_l2()
            a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            a.record()
            graph.replay()
            b.record()
            b.synchronize()
            if i >= 3:
                times.append(a.elapsed_time(b) * 1e3 / self.sets)
        times.sort()
        return times[len(times) // 2], times[0], step


def report(name, timing, **how):
    try:
        middle, best, step = timing.time(**how)
    except Exception as e:
        print(f"time {name} {how}: {type(e).__name__} {str(e)[:300]}", flush=True)
        return math.inf
    floor = floor_us(timing.spec, [timing.length] * timing.batch, timing.kv, timing.d, timing.v, timing.dense)
    print(f"time {name} {how}: {middle:.1f} us (best {best:.1f}) floor {floor:.1f} ratio {middle / floor:.2f} regs {step.kernel.registers} "
          f"local {step.kernel.local} shared {step.shared}", flush=True)
    return middle


FULL = (
    dict(splits=1, slots=5, tile=64, choosers=64, resident=2, logits_global=True),
    dict(splits=1, slots=5, tile=64, choosers=64, resident=2, logits_global=True, once=True),
    dict(splits=1, slots=10, tile=32, choosers=64, resident=2, logits_global=True, once=True),
    dict(splits=1, slots=5, tile=64, choosers=32, resident=2, logits_global=True, once=True),
    dict(splits=1, slots=5, tile=64, choosers=128, resident=2, logits_global=True, once=True),
    dict(splits=2, slots=3, tile=64, choosers=64, resident=2, logits_global=True, once=True),
    dict(splits=4, slots=3, tile=64, choosers=64, resident=2, logits_global=True, once=True),
    dict(splits=1, slots=10, tile=64, choosers=128, resident=1, logits_global=True, once=True),
    dict(splits=8, slots=3, tile=32, choosers=64, resident=2, once=True),
    dict(splits=8, slots=8, tile=64, choosers=128, resident=1, once=True),
    dict(splits=4, slots=6, tile=64, choosers=128, resident=1, once=True),
)
ONE = (
    dict(splits=16, slots=8, tile=64, choosers=128, resident=1),
    dict(splits=16, slots=8, tile=64, choosers=256, resident=1),
    dict(splits=16, slots=8, tile=64, choosers=64, resident=1),
    dict(splits=16, slots=12, tile=32, choosers=128, resident=1),
    dict(splits=8, slots=8, tile=64, choosers=128, resident=1),
    dict(splits=4, slots=6, tile=64, choosers=128, resident=1),
)
DENSE = tuple(dict(splits=s, slots=6, tile=64, resident=2) for s in (1, 2, 4, 8)) + (
    dict(splits=16, slots=6, tile=64, resident=2), dict(splits=16, slots=12, tile=64, resident=1), dict(splits=4, slots=5, tile=64, resident=2, once=True))


def sweep_set(name, timing, hows):
    compile_all([timing.step(**how) for how in hows])
    for how in hows:
        report(name, timing, **how)


def sweep():
    sweep_set("64 x 64k", Timing(64, 65536), FULL)
    sweep_set("1 x 64k of 12", Timing(1, 65536, sets=12), ONE)
    one = Timing(1, 65536)
    sweep_set("1 x 64k flushed", one, ONE[:1] + ONE[4:5])
    for how in (ONE[0], ONE[4]):
        try:
            stamps(one, **how)
        except Exception as e:
            print("stamps", type(e).__name__, str(e)[:500])
    sweep_set("dense 1 x 64k", Timing(1, 65536, dense=True, sets=2), DENSE[3:6])
    sweep_set("dense 16 x 64k", Timing(16, 65536, dense=True), DENSE)


TABLE = {
    8192: (dict(splits=1, slots=4, tile=32, choosers=64, resident=2, once=True), dict(splits=1, slots=3, tile=64, choosers=64, resident=2, once=True),
           dict(splits=1, slots=3, tile=32, choosers=32, resident=3, once=True), dict(splits=1, slots=5, tile=64, choosers=64, resident=2, logits_global=True, once=True)),
    16384: (dict(splits=1, slots=4, tile=32, choosers=64, resident=2, once=True), dict(splits=1, slots=5, tile=64, choosers=64, resident=2, logits_global=True, once=True)),
    32768: (dict(splits=1, slots=5, tile=64, choosers=64, resident=2, logits_global=True, once=True), dict(splits=4, slots=3, tile=32, choosers=64, resident=2, once=True)),
}


def table():
    for n, hows in TABLE.items():
        batch = (64 << 16) // n
        sweep_set(f"{batch} x {n}", Timing(batch, n), hows)


STAMPS = (  # what a thread has reached, and the text before which (or, with +, after which) it notes the time
    ("queries asked", "        float acc[BRANCHES][COLUMNS][4];"),
    ("cmp tiles", "        total(state, shared.totals[0]);\n        if constexpr (CLUSTER > 1) cluster_wait();\n        if (ranked)"),
    ("cmp handed over", "        state = empty;\n        for (int i = 0; i < win_count"),
    ("win tiles", "        total(state, shared.totals[2]);"),
    ("slc tiles", "        total(state, shared.totals[1]);"),
    ("sent", "            barrier_wait_peers(&shared.merged);"),
    ("merged", "            if (thread < BRANCHES * OWN) {"),
    ("written", "    } else if (warp == WORKERS / 32) {"),
    ("producer: cluster there", "        int load = 0, round = 0;\n#ifdef READ_ONCE"),
    ("producer: known tiles asked", "        if (ranked && SELECT_COUNT > SELECT_INITIAL + SELECT_LOCAL) {\n            group_sync<3"),
    ("producer: choice there", "            stream(rest_count, false)"),
    ("producer: all asked", "#endif\n    }\n#ifndef DENSE\n    else {"),
    ("chooser: logits there", "            if constexpr (SPLITS > 1) barrier_wait_peers(&shared.summed);"),
    ("chooser: sums there", "            if (chooser < HEADS) {\n                auto part"),
    ("chooser: importance sent", "            if constexpr (CLUSTER == 1 || GLOBAL) group_sync<2"),
    ("chooser: importance there", "            constexpr int R = SELECT_BLOCK / COMPRESS_STRIDE, S = COMPRESS_BLOCK / COMPRESS_STRIDE;\n            constexpr int FREE"),
    ("chooser: scores", "                choose<2>(keys"),
    ("chooser: chosen", "                group_sync<3, PRODUCERS + CHOOSERS>();\n            }\n        }\n        if (rank == 0"),
)


def stamps(timing, **how):
    """Clocks since its start at which a block reaches each place: median over blocks, and the last."""
    folder = pathlib.Path(tempfile.mkdtemp())
    folder.mkdir(exist_ok=True)
    for f in SOURCES.glob("*.cu*"):
        (folder / f.name).write_text(f.read_text())
    text = (folder / "step.cu").read_text()
    for i, (_, place) in enumerate(STAMPS):
        assert text.count(place) == 1, place
        text = text.replace(place, f"STAMP({i})\n" + place)
    text = text.replace("#include \"cluster.cuh\"", "#define STAMP(i) if ((threadIdx.x & 31) == 0) stamp[i] = clock64() - began;\n#include \"cluster.cuh\"", 1)
    text = text.replace("    extern __shared__ __align__(1024)", "    const long long began = clock64();\n    long long* stamp = (long long*)p.scratch + (i64)blockIdx.x * 32;\n"
                        "    extern __shared__ __align__(1024)", 1)
    (folder / "step.cu").write_text(text)
    step = timing.step(**how)
    name, entry, defines = step.key
    step.__class__ = type("Stamped", (Step,), {"kernel": Compiled(compile_cubin(folder / name, dict(defines))[0], entry)})
    blocks = timing.batch * timing.kv * step.cluster
    step.scratch_row = 64 * step.cluster
    run = step.bind(timing.q, timing.gate, timing.out, timing.positions, timing.cmp, timing.slc, timing.win, None, timing.sequences[0])
    for _ in range(3):
        flush_l2()
        keep = run()
    torch.cuda.synchronize()
    clocks = keep[-1].view(torch.int64)[:blocks * 32].reshape(blocks, 32)
    print("stamps", how, flush=True)
    for i, (what, _) in enumerate(STAMPS):
        column = clocks[:, i].double()
        print(f"  {what}: {column.median().item():.0f} last {column.max().item():.0f}", flush=True)
