"""Decode steps against float64 formulas, over many shapes."""
import math

import torch

from steps import AppendArg, Cache, SOURCES, SPEC, Step, Target, compile_all, compressed
from harness import TYPES, Kernel  # noqa: E402


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
