"""Decode steps on Hopper: right first, then timed against the bytes they must read.

run.py check | time | sweep
"""
import ctypes
import math
import multiprocessing
import pathlib
import tempfile
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from harness import ROOT, SWIZZLE_128B, TYPES, Kernel, Map, check as driver_check, compile_cubin, driver, flush_l2  # noqa: E402

SOURCES = ROOT / "crates/attention/src/cuda/decode"
BANDWIDTH = 4.3e12
SPEC = dict(COMPRESS_BLOCK=32, COMPRESS_STRIDE=16, SELECT_BLOCK=64, SELECT_COUNT=16, SELECT_INITIAL=1, SELECT_LOCAL=2,
            WINDOW=512)
u64, i32, f32 = ctypes.c_uint64, ctypes.c_int32, ctypes.c_float


class CacheArg(ctypes.Structure):
    _fields_ = [("k", u64), ("v", u64), ("table", u64), ("page", i32), ("width", i32), ("interleaved", i32), ("ring", i32)]


class Params(ctypes.Structure):
    _fields_ = [("q", u64), ("gate", u64), ("out", u64), ("indices", u64), ("positions", u64), ("sequences", u64),
                ("cmp", CacheArg), ("slc", CacheArg), ("win", CacheArg), ("scratch", u64), ("rows", i32),
                ("kv_heads", i32), ("slice", i32), ("blocks", i32), ("scale", f32)]


class Target(ctypes.Structure):
    _fields_ = [("k", u64), ("v", u64), ("cache", CacheArg)]


class AppendArg(ctypes.Structure):
    _fields_ = [("targets", Target * 3), ("positions", u64), ("sequences", u64), ("kv_heads", i32), ("cmp", CacheArg),
                ("turns", u64)]


def compressed(spec, n):
    l, d = spec["COMPRESS_BLOCK"], spec["COMPRESS_STRIDE"]
    return 0 if n < l else (n - l) // d + 1


class PageMap(Map):
    """A TMA map over one of a cache's tensors: boxes of 64 columns and `tile` tokens of a head of a page."""

    def __init__(self, store, interleaved, tile):
        pages, a, b, dim = store.shape
        heads, page = (b, a) if interleaved else (a, b)
        token, head = (heads * dim, dim) if interleaved else (dim, page * dim)
        kind = driver.CUtensorMapDataType
        dtype = {torch.bfloat16: kind.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, torch.float16: kind.CU_TENSOR_MAP_DATA_TYPE_FLOAT16}[store.dtype]
        wide, narrow = driver.cuuint64_t, driver.cuuint32_t
        self.keep = store
        self.map = driver_check(driver.cuTensorMapEncodeTiled(
            dtype, 4, store.data_ptr(), [wide(x) for x in (dim, page, heads, pages)],
            [wide(x * 2) for x in (token, head, heads * page * dim)], [narrow(x) for x in (64, tile, 1, 1)], [narrow(1)] * 4,
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE, SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE))


class Cache:
    """Pages of [K, page, dim] or [page, K, dim]; `pages` a sequence, shuffled; or one ring each."""

    def __init__(self, sequences, capacity, kv, d, v, dtype, page=None, interleaved=False, ring=False, fill=math.nan):
        self.page = page or -(-capacity // 64) * 64
        self.width = 1 if page is None else -(-capacity // page)
        self.kv, self.interleaved, self.ring = kv, interleaved, ring
        count = sequences * self.width
        shape = lambda x: (count, self.page, kv, x) if interleaved else (count, kv, self.page, x)
        self.k = torch.full(shape(d), fill, device="cuda", dtype=dtype) if fill is not None else torch.empty(shape(d), device="cuda", dtype=dtype).normal_()
        self.v = torch.full(shape(v), fill, device="cuda", dtype=dtype) if fill is not None else torch.empty(shape(v), device="cuda", dtype=dtype).normal_()
        self.table = None
        if page is not None:
            self.table = torch.randperm(count, device="cuda").to(torch.int32).reshape(sequences, self.width).contiguous()

    def place(self, sequence, tokens):
        slot = tokens % self.page if self.ring else tokens
        page = slot // self.page
        at = self.table[sequence][page].long() if self.table is not None else torch.full_like(slot, sequence)
        return at, slot % self.page

    def put(self, sequence, tokens, k, v):
        at, slot = self.place(sequence, tokens)
        for store, x in ((self.k, k), (self.v, v)):
            if self.interleaved:
                store[at, slot] = x
            else:
                store[at, :, slot] = x

    def get(self, sequence, tokens):
        at, slot = self.place(sequence, tokens)
        return tuple(s[at, slot] if self.interleaved else s[at, :, slot] for s in (self.k, self.v))

    def maps(self, tile):
        return [PageMap(x, self.interleaved, tile) for x in (self.k, self.v)]

    def arg(self):
        table = 0 if self.table is None else self.table.data_ptr()
        return CacheArg(self.k.data_ptr(), self.v.data_ptr(), table, self.page, self.width, self.interleaved, self.ring)


NONE = CacheArg(0, 0, 0, 1, 0, 0, 0)


class Compiled(Kernel):
    """A kernel whose cubin is there already."""

    def __init__(self, cubin, entry):
        torch.cuda.current_stream()
        self.module = driver_check(driver.cuModuleLoadData(cubin))
        self.function = driver_check(driver.cuModuleGetFunction(self.module, entry.encode()))
        attribute = driver.CUfunction_attribute
        read = lambda a: driver_check(driver.cuFuncGetAttribute(a, self.function))
        self.registers = read(attribute.CU_FUNC_ATTRIBUTE_NUM_REGS)
        self.local = read(attribute.CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES)
        self.static = read(attribute.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)
        self.shared = self.allowed = 0
        driver_check(driver.cuFuncSetAttribute(self.function, attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100))
        driver_check(driver.cuFuncSetAttribute(self.function, attribute.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1))

    def allow(self, shared):
        if shared > self.allowed:
            name = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            driver_check(driver.cuFuncSetAttribute(self.function, name, shared))
            self.allowed = shared
        self.shared = shared


def compile_one(key):
    name, _, defines = key
    try:
        return compile_cubin(SOURCES / name, dict(defines))[0]
    except RuntimeError as e:
        return str(e)


def compile_all(steps):
    """Compiles what the steps need, in processes that never touch the device."""
    keys = sorted({step.key for step in steps} - Step.kernels.keys(), key=str)
    with multiprocessing.get_context("fork").Pool() as pool:
        Step.kernels.update(zip(keys, pool.map(compile_one, keys, chunksize=1)))


class Step:
    """`step.cu` (or `plain.cu`) for one shape."""

    kernels = {}

    def __init__(self, spec, heads, kv, d, v, dtype, longest, splits=4, slots=4, tile=32, choosers=64, resident=2,
                 logits_global=False, plain=False, dense=False, once=False, importance_global=False):
        group = heads // kv
        self.spec, self.plain, self.dense, self.kv, self.d = spec, plain, dense, kv, d
        self.heads, self.v = heads, v
        tiles = -(-group // 16)
        self.cluster = splits * tiles
        n = compressed(spec, longest)
        self.blocks = -(-longest // spec["SELECT_BLOCK"])
        defines = {TYPES[dtype]: 1, "GROUP": group, "D": d, "V": v, **spec}
        if dense:
            defines["DENSE"] = 1
        if plain:
            self.slice = longest if dense else max(n, spec["SELECT_COUNT"] * spec["SELECT_BLOCK"], min(spec["WINDOW"], longest))
            self.scratch_row = self.slice if dense else 2 * self.slice + self.blocks + spec["SELECT_COUNT"] + group * v
            self.threads, shared, name, entry = 256, 0, "plain.cu", "decode_plain"
        else:
            per = -(-(-(-n // tile)) // splits) * tile
            self.slice = per
            rows = 1 if logits_global else 16
            panels = max(-(-d // 64), -(-v // 64))
            shared = slots * tile * 128 * panels
            branches = 1 if dense else 3
            if splits > 1:
                shared += 16 * branches * v * 4
            if not dense:
                shared += 4 * (0 if importance_global else tiles * per * splits)
                shared += 4 * (-(-self.blocks // 4) * 4 + (0 if logits_global else 16 * (per + 8)))
            self.scratch_row = 16 * (per + 8) * self.cluster if logits_global else 0
            self.threads, name, entry = 160 + (0 if dense else choosers), "step.cu", "decode_step"
            defines |= dict(SPLITS=splits, SLOTS=slots, TILE=tile, CHOOSERS=choosers, RESIDENT=resident)
            if importance_global:
                defines["IMPORTANCE_GLOBAL"] = defines["LOGITS_GLOBAL"] = 1
                self.scratch_row = 16 * (per + 8) * self.cluster + tiles * per * splits
            if once:
                defines["READ_ONCE"] = 1
            if logits_global:
                defines["LOGITS_GLOBAL"] = 1
        self.tile = tile
        self.key = (name, entry, tuple(sorted(defines.items())))
        self.shared = shared

    @property
    def kernel(self):
        kernel = Step.kernels.get(self.key) or compile_one(self.key)
        if isinstance(kernel, bytes):
            kernel = Compiled(kernel, self.key[1])
        Step.kernels[self.key] = kernel
        if isinstance(kernel, str):
            raise RuntimeError(kernel)
        return kernel

    def bind(self, q, gate, out, positions, cmp, slc, win, indices=None, sequences=None):
        rows = q.shape[0]
        address = lambda x: 0 if x is None else x.data_ptr()
        arg = lambda c: NONE if c is None else c.arg()
        scratch = torch.empty(max(rows * self.kv * self.scratch_row, 1), device="cuda") if self.scratch_row else None
        params = Params(address(q), address(gate), address(out), address(indices), address(positions), address(sequences),
                        arg(cmp), arg(slc), arg(win), address(scratch), rows, self.kv, self.slice, self.blocks,
                        1 / math.sqrt(self.d))
        grid = (rows * self.kv * (1 if self.plain else self.cluster),)
        kernel = self.kernel
        maps = []
        if not self.plain:
            for cache in (cmp, slc, win):
                maps += (cache or slc).maps(self.tile)
        keep = (q, gate, out, positions, cmp, slc, win, indices, sequences, scratch)

        def run():
            kernel.allow(self.shared)
            kernel(grid, (self.threads,), *maps, params)
            return keep

        return run


def softmax_out(q, k, v, dtype):
    """q [H, D], k [n, K, D], v [n, K, V]: probabilities [K, G, n] and output [H, V] in `dtype`."""
    h, kv = q.shape[0], k.shape[1]
    qs = q.to(dtype).reshape(kv, h // kv, -1)
    s = (qs @ k.to(dtype).permute(1, 2, 0)) * (1 / math.sqrt(q.shape[1]))
    p = torch.softmax(s, -1)
    return p, (p @ v.to(dtype).permute(1, 0, 2)).reshape(h, -1)


def scores(spec, p, position):
    """Block scores [K, J] from probabilities [K, n], in their dtype."""
    j = position // spec["SELECT_BLOCK"] + 1
    r, s = spec["SELECT_BLOCK"] // spec["COMPRESS_STRIDE"], spec["COMPRESS_BLOCK"] // spec["COMPRESS_STRIDE"]
    out = torch.zeros(p.shape[0], j, device=p.device, dtype=p.dtype)
    base = torch.arange(j, device=p.device) * r
    for m in range(r):
        for n in range(s):
            i = base + m - n
            ok = (i >= 0) & (i < p.shape[1])
            out += torch.where(ok, p[:, i.clamp(0, p.shape[1] - 1)], 0.0)
    return out


def row_reference(spec, q, gate, cmp, slc, win, position, chosen, dtype):
    """Output [H, V] with the blocks in `chosen` [K, S]."""
    out = torch.zeros(q.shape[0], slc[1].shape[-1], device="cuda", dtype=dtype)
    g = gate.to(dtype)
    h, kv = q.shape[0], slc[0].shape[1]
    if cmp[0].shape[0]:
        out += g[:, :1] * softmax_out(q, *cmp, dtype)[1]
    parts = []
    for head in range(kv):
        tokens = (chosen[head][chosen[head] >= 0].long()[:, None] * spec["SELECT_BLOCK"] + torch.arange(spec["SELECT_BLOCK"], device="cuda")).flatten()
        tokens = tokens[tokens <= position]
        own = q.reshape(kv, h // kv, -1)[head]
        parts.append(softmax_out(own, slc[0][tokens, head:head + 1], slc[1][tokens, head:head + 1], dtype)[1])
    out += g[:, 1:2] * torch.cat(parts)
    first = max(position - spec["WINDOW"] + 1, 0)
    return out + g[:, 2:] * softmax_out(q, win[0][first:position + 1], win[1][first:position + 1], dtype)[1]


def near_tie(spec, score, position, got):
    """How far the chosen set is from the best one, relative to the last score that gets in."""
    current = position // spec["SELECT_BLOCK"]
    first, last = spec["SELECT_INITIAL"], current + 1 - spec["SELECT_LOCAL"]
    free = spec["SELECT_COUNT"] - first - spec["SELECT_LOCAL"]
    if free == 0:
        return 0.0
    cut = torch.sort(score[first:last], descending=True).values[free - 1].item()
    inside = [b for b in got.tolist() if first <= b < last]
    if len(set(inside)) != free:
        return math.inf
    lowest = min(score[b].item() for b in inside)
    return (cut - lowest) / max(cut, 1e-300)


def one_check(label, spec, lengths, heads, kv, d, v, dtype, page=64, interleaved=False, sharp=1.0, dense=False, window=0, **how):
    b = len(lengths)
    longest = max(lengths)
    make = lambda n, dim: torch.randn(n, kv, dim, device="cuda").to(dtype)
    q = (torch.randn(b, heads, d, device="cuda") * sharp).to(dtype)
    gate = torch.rand(b, heads, 3, device="cuda").to(dtype)
    positions = torch.tensor([n - 1 for n in lengths], dtype=torch.int32, device="cuda")
    out = torch.full((b, heads, v), math.nan, device="cuda", dtype=dtype)
    spec = dict(spec, WINDOW=window) if dense else spec
    step = Step(spec, heads, kv, d, v, dtype, max(longest, 1), dense=dense, **how)
    n = compressed(spec, longest)
    if dense:
        ring = window + 64 if window else 0
        cache = Cache(b, ring or longest, kv, d, v, dtype, None if ring else page, interleaved, bool(ring))
        data = []
        for i, t in enumerate(lengths):
            kk, vv = make(t, d), make(t, v)
            first = max(t - cache.page, 0) if ring else 0
            if t:
                cache.put(i, torch.arange(first, t, device="cuda"), kk[first:], vv[first:])
            data.append((kk, vv))
        step.bind(q, None, out, positions, None, cache, None)()
        torch.cuda.synchronize()
        ref, low = [], []
        for i, (kk, vv) in enumerate(data):
            first = max(lengths[i] - window, 0) if window else 0
            for dst, ty in ((ref, torch.float64), (low, dtype)):
                dst.append(softmax_out(q[i], kk[first:], vv[first:], ty)[1] if lengths[i] else torch.zeros(heads, v, device="cuda", dtype=ty))
        gap, same = 0.0, True
    else:
        cmp = Cache(b, max(n, 1), kv, d, v, dtype, None if page == 64 else 64, interleaved)
        slc = Cache(b, max(longest, 1), kv, d, v, dtype, page, interleaved)
        win = Cache(b, spec["WINDOW"] + 64, kv, d, v, dtype, None, interleaved, True)
        data = []
        for i, t in enumerate(lengths):
            c, s, w = (make(compressed(spec, t), d), make(compressed(spec, t), v)), (make(t, d), make(t, v)), (make(t, d), make(t, v))
            if t:
                first = max(t - win.page, 0)
                cmp.put(i, torch.arange(len(c[0]), device="cuda"), *c)
                slc.put(i, torch.arange(t, device="cuda"), *s)
                win.put(i, torch.arange(first, t, device="cuda"), w[0][first:], w[1][first:])
            data.append((c, s, w))
        indices = torch.full((b, kv, spec["SELECT_COUNT"]), -7, dtype=torch.int32, device="cuda")
        run = step.bind(q, gate, out, positions, cmp, slc, win, indices)
        run()
        torch.cuda.synchronize()
        again, again_indices = out.clone(), indices.clone()
        out.fill_(math.nan)
        run()
        torch.cuda.synchronize()
        same = torch.equal(again, out) and torch.equal(again_indices, indices)
        gap, ref, low = 0.0, [], []
        for i, t in enumerate(lengths):
            if t == 0:
                same &= bool((indices[i] == -1).all())
                for dst, ty in ((ref, torch.float64), (low, dtype)):
                    dst.append(torch.zeros(heads, v, device="cuda", dtype=ty))
                continue
            current, count = (t - 1) // spec["SELECT_BLOCK"], spec["SELECT_COUNT"]
            for head in range(kv):
                got = indices[i, head]
                if current < count:
                    want = torch.tensor([j if j <= current else -1 for j in range(count)], device="cuda")
                    same &= bool((got == want).all())
                else:
                    same &= bool((got[1:] > got[:-1]).all()) and got[0] >= 0 and int(got[-1]) <= current
                    forced = [*range(spec["SELECT_INITIAL"]), *range(current + 1 - spec["SELECT_LOCAL"], current + 1)]
                    same &= all(f in got.tolist() for f in forced)
            if current >= count:
                p = softmax_out(q[i], *data[i][0], torch.float64)[0].sum(1)
                sc = scores(spec, p, t - 1)
                gap = max([gap] + [near_tie(spec, sc[head], t - 1, indices[i, head]) for head in range(kv)])
            ok = indices[i].clamp(-1, current)
            ref.append(row_reference(spec, q[i], gate[i], *data[i], t - 1, ok, torch.float64))
            low.append(row_reference(spec, q[i], gate[i], *data[i], t - 1, ok, dtype))
    ref, low = torch.stack(ref), torch.stack(low)
    norm = ref.norm().item() + 1e-30
    error, bound = (out.double() - ref).norm().item() / norm, 2 * (low.double() - ref).norm().item() / norm + 1e-6
    good = same and error <= bound and gap <= 1e-5
    print(f"{'ok  ' if good else 'FAIL'} {label}: error {error:.2e} allowed {bound:.2e} gap {gap:.1e} same {same} regs {step.kernel.registers} local {step.kernel.local}", flush=True)
    return good


def cases():
    bf, hf, full = torch.bfloat16, torch.float16, torch.float32
    short = [1, 0, 31, 32, 33, 63, 64, 65, 511, 512, 513, 1000, 1024, 1025, 1088, 1089, 3000]
    found = []
    fast = dict(splits=4)
    add = lambda label, *a, **k: found.append((label, a, k))
    add("plain f32 5/1 40/24", SPEC, [1, 33, 700, 1500], 5, 1, 40, 24, full, plain=True)
    add("plain bf16 16/4 128", SPEC, short, 16, 4, 128, 128, bf, plain=True)
    add("plain dense f32", SPEC, [1, 33, 700], 6, 2, 80, 64, full, plain=True, dense=True)
    add("plain dense window f32", SPEC, [1, 33, 700], 6, 2, 80, 64, full, plain=True, dense=True, window=100)
    for dtype in (bf, hf):
        add(f"short 64/4 128 {dtype}", SPEC, short, 64, 4, 128, 128, dtype, **fast)
    for splits, tile, slots, choosers in ((1, 32, 4, 64), (2, 64, 3, 128), (8, 64, 6, 128), (16, 32, 4, 128), (2, 32, 5, 32), (4, 64, 3, 256)):
        add(f"short splits {splits} tile {tile} slots {slots} choosers {choosers}", SPEC, short, 32, 2, 128, 128, bf, splits=splits, tile=tile, slots=slots, choosers=choosers, resident=1)
    for group in (1, 4, 8, 16, 20, 48, 64):
        add(f"group {group}", SPEC, [40, 1100, 5000, 2049], group * 2, 2, 128, 128, bf, splits=4, resident=1)
    for d, v in ((64, 64), (96, 96), (192, 128), (192, 192), (256, 256), (64, 256), (256, 64), (128, 96)):
        for tile in (32, 64):
            add(f"dims {d}/{v} tile {tile}", SPEC, [5, 65, 1500, 4100], 16, 2, d, v, bf, splits=4, resident=1, tile=tile)
    add("page 128", SPEC, short, 32, 2, 128, 128, bf, page=128, **fast)
    add("page 64 interleaved", SPEC, short, 32, 2, 128, 128, bf, interleaved=True, **fast)
    add("page 256 interleaved", SPEC, short, 32, 2, 64, 64, bf, page=256, interleaved=True, **fast)
    add("logits global", SPEC, short + [20000], 32, 2, 128, 128, bf, logits_global=True, splits=8, tile=64, resident=1)
    add("importance global", SPEC, short + [20000], 64, 2, 128, 128, bf, logits_global=True, importance_global=True, splits=8, tile=64, resident=1)
    add("sharp", SPEC, [3000, 20000], 32, 2, 128, 128, bf, sharp=5.0, **fast)
    for name, spec in (
        ("l64 d16 s128", dict(SPEC, COMPRESS_BLOCK=64, SELECT_BLOCK=128, SELECT_COUNT=6)),
        ("l16 d8 s16 n20 w100", dict(SPEC, COMPRESS_BLOCK=16, COMPRESS_STRIDE=8, SELECT_BLOCK=16, SELECT_COUNT=20, WINDOW=100)),
        ("l32 d16 s32 n3 w1", dict(SPEC, SELECT_BLOCK=32, SELECT_COUNT=3, WINDOW=1)),
        ("l32 d32 s32 n8 i0 o1", dict(SPEC, COMPRESS_STRIDE=32, SELECT_BLOCK=32, SELECT_COUNT=8, SELECT_INITIAL=0, SELECT_LOCAL=1)),
        ("s64 n4 i2 o2 free 0", dict(SPEC, SELECT_COUNT=4, SELECT_INITIAL=2)),
        ("l24 d12 s48 w600 n7", dict(SPEC, COMPRESS_BLOCK=24, COMPRESS_STRIDE=12, SELECT_BLOCK=48, SELECT_COUNT=7, WINDOW=600)),
        ("l64 d64 s64 n5", dict(SPEC, COMPRESS_BLOCK=64, COMPRESS_STRIDE=64, SELECT_COUNT=5)),
        ("l8 d4 s96 n5 o0", dict(SPEC, COMPRESS_BLOCK=8, COMPRESS_STRIDE=4, SELECT_BLOCK=96, SELECT_COUNT=5, SELECT_LOCAL=0)),
        ("l1 d1 s1 n40", dict(SPEC, COMPRESS_BLOCK=1, COMPRESS_STRIDE=1, SELECT_BLOCK=1, SELECT_COUNT=40, WINDOW=64)),
    ):
        if spec["SELECT_BLOCK"] % 32 == 0:
            add("spec " + name, spec, [1, 17, 100, 1000, 2500], 16, 2, 64, 64, bf, splits=4, resident=1)
        add("plain spec " + name, spec, [1, 17, 100, 1000, 2500], 16, 2, 64, 64, full, plain=True)
    for window in (0, 1, 512, 130):
        add(f"dense window {window}", SPEC, short, 32, 2, 128, 128, bf, dense=True, window=window, splits=4)
        add(f"dense f16 192/128 window {window}", SPEC, short, 8, 4, 192, 128, hf, dense=True, window=window, splits=8, resident=1)
    add("dense splits 16", SPEC, [65536, 3], 64, 4, 128, 128, bf, dense=True, splits=16, tile=64, slots=6, resident=1)
    add("64k", SPEC, [65536, 65535, 40000], 64, 4, 128, 128, bf, **fast)
    add("64k splits 16", SPEC, [65536], 64, 4, 128, 128, bf, splits=16, tile=64, slots=8, choosers=128, resident=1)
    add("64k 192/128", SPEC, [65536, 30000], 64, 4, 192, 128, bf, splits=8, resident=1)
    return found


def case_steps():
    step_of = lambda spec, lengths, heads, kv, d, v, dtype, page=64, interleaved=False, sharp=1.0, dense=False, window=0, **how: Step(
        dict(spec, WINDOW=window) if dense else spec, heads, kv, d, v, dtype, max(lengths), dense=dense, **how)
    return [step_of(*a, **k) for _, a, k in cases()]


def check():
    torch.manual_seed(1)
    bad, total = [], 0
    compile_all(case_steps())
    for label, a, k in cases():
        total += 1
        try:
            good = one_check(label, *a, **k)
        except Exception as e:  # the other cases are still worth the round
            good = False
            print(f"FAIL {label}: {type(e).__name__} {str(e)[:600]}", flush=True)
            if "ILLEGAL" in str(e) or "illegal" in str(e) or "LAUNCH_FAILED" in str(e):
                print("the context is lost")
                break
        if not good:
            bad.append(label)
    print("check_append", check_append(), flush=True)
    print(f"{total - len(bad)}/{total} right; wrong: {bad}", flush=True)


def check_append():
    """Tokens one by one into all caches, then the caches against the tokens and their means."""
    spec, kv, d, v, b, t = SPEC, 2, 128, 64, 3, 200
    good = True
    for dtype in (torch.bfloat16, torch.float32):
        offsets = [0, 7, 90]
        raw, slc, win = ((torch.randn(t + 100, b, kv, d, device="cuda").to(dtype), torch.randn(t + 100, b, kv, v, device="cuda").to(dtype)) for _ in range(3))
        caches = [Cache(b, spec["COMPRESS_BLOCK"], kv, d, v, dtype, None, False, True), Cache(b, 512, kv, d, v, dtype, 64),
                  Cache(b, 128, kv, d, v, dtype, None, False, True)]
        caches[0].page = caches[0].k.shape[2]
        cmp = Cache(b, 64, kv, d, v, dtype, 64)
        turns = torch.randn(512, 2, d // 2, device="cuda")
        kernel = Kernel(SOURCES / "append.cu", "append", {TYPES[dtype]: 1, "D": d, "V": v, "COMPRESS_BLOCK": 32, "COMPRESS_STRIDE": 16})
        for step in range(t + max(offsets)):
            position = torch.tensor([step - o if 0 <= step - o < t else -1 for o in offsets], dtype=torch.int32, device="cuda")
            rows = [tuple(x[min(step, t + 99)].contiguous() for x in pair) for pair in (raw, slc, win)]
            targets = (Target * 3)(*[Target(k.data_ptr(), w.data_ptr(), c.arg()) for (k, w), c in zip(rows, caches)])
            arg = AppendArg(targets, position.data_ptr(), 0, kv, cmp.arg(), turns.data_ptr())
            kernel((b * kv,), (128,), arg)
            torch.cuda.synchronize()
        for i, o in enumerate(offsets):
            all_k, all_v = slc[0][o:o + t, i], slc[1][o:o + t, i]
            k, w = caches[1].get(i, torch.arange(t, device="cuda"))
            good &= torch.equal(k, all_k) and torch.equal(w, all_v)
            last = torch.arange(t - 128, t, device="cuda")
            k, w = caches[2].get(i, last)
            good &= torch.equal(k, win[0][o:o + t, i][last]) and torch.equal(w, win[1][o:o + t, i][last])
            n = compressed(spec, t)
            k, w = cmp.get(i, torch.arange(n, device="cuda"))
            for j in range(n):
                blocks = [x[o + j * 16:o + j * 16 + 32, i].float() for x in raw]
                sums = [torch.zeros_like(x[0]) for x in blocks]
                for step in range(32):
                    sums = [s + x[step] for s, x in zip(sums, blocks)]
                key, value = ((s / 32).to(dtype).float() for s in sums)
                c, s = turns[j * 16]
                x, y = key[:, :d // 2], key[:, d // 2:]
                key = torch.cat([x * c - y * s, y * c + x * s], -1).to(dtype)
                good &= torch.equal(w[j], value.to(dtype)) and (k[j].float() - key.float()).abs().max().item() <= 1e-2 * (dtype == torch.bfloat16) + 1e-6
    return good


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


def compile_only():
    """No device: every kernel of the checks and sweeps, and what the compiler says of it."""
    steps = case_steps()
    for how in FULL + ONE:
        steps.append(Step(SPEC, 64, 4, 128, 128, torch.bfloat16, 65536, **how))
    for n, hows in TABLE.items():
        steps += [Step(SPEC, 64, 4, 128, 128, torch.bfloat16, n, **how) for how in hows]
    for how in DENSE:
        steps.append(Step(dict(SPEC, WINDOW=0), 64, 4, 128, 128, torch.bfloat16, 65536, dense=True, **how))
    compile_all(steps)
    for (name, _, defines), cubin in Step.kernels.items():
        if isinstance(cubin, str):
            print(name, dict(defines), cubin[-1500:])
    print(len(Step.kernels), "kernels")
    for step in steps:
        if step.shared > 232448 - 6 * 1024:
            print("too much shared memory", step.key, step.shared)


if __name__ == "__main__":
    if sys.argv[1:] == ["compile"]:
        sys.exit(compile_only())
    what = sys.argv[1:] or ["check", "sweep", "table"]
    for name in what:
        print(f"== {name} on {torch.cuda.get_device_name()}", flush=True)
        {"check": check, "sweep": sweep, "table": table}[name]()
