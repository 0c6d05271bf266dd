"""The kernels of `crates/tensor/src/cuda` against float64 formulas; `ops_time.py` times them.

    python lab/ops.py

Every output is poisoned first, every case runs twice and must give the same bits. An error is
‖out − exact‖ / ‖exact‖; a result may have twice the error of the rounded exact one.
"""
import ctypes
import traceback

import torch
from harness import ROOT, TYPES, Kernel

OPS = ROOT / "crates/tensor/src/cuda"
F64 = torch.float64
long = ctypes.c_int64
kernels = {}
failures = []
SM = torch.cuda.get_device_properties(0).multi_processor_count


def kernel(file, entry, dtype, **defines):
    key = (file, entry, dtype, tuple(sorted(defines.items())))
    if key not in kernels:
        kernels[key] = Kernel(OPS / f"{file}.cu", entry, {TYPES[dtype]: 1, **defines})
        if kernels[key].local:
            print(f"     {entry} {dtype} {defines}: {kernels[key].registers} registers, "
                  f"{kernels[key].local} bytes of local memory")
    return kernels[key]


def poison(shape, dtype):
    if dtype in (torch.int32,):
        return torch.full(shape, -(2**30), dtype=dtype, device="cuda")
    return torch.full(shape, float("nan"), dtype=dtype, device="cuda")


def up(a, b):
    return -(-a // b)


def pow2(n):
    return 1 << max(0, (n - 1).bit_length())


def vec(width, dtype, most=16):
    v = most // torch.empty(0, dtype=dtype).element_size()
    while width % v:
        v //= 2
    return v


def report(name, outs, exacts, dtypes):
    text = []
    good = True
    for (label, out), exact, dtype in zip(outs.items(), exacts, dtypes):
        if out.numel() == 0:
            continue
        exact = exact.to(F64)
        norm = exact.norm().item()
        allowed = 2 * (exact.to(dtype).to(F64) - exact).norm().item() + 4e-6 * norm + 1e-30
        error = (out.to(F64) - exact).norm().item()
        ok = error <= allowed
        good &= ok
        text.append(f"{label} {error / max(norm, 1e-300):.1e}{'' if ok else ' BAD, allowed ' + format(allowed / max(norm, 1e-300), '.1e')}")
    print(("ok   " if good else "FAIL ") + name + ": " + ", ".join(text), flush=True)
    if not good:
        failures.append(name)


def case(name, run, exacts, dtypes):
    """`run()` gives named fresh outputs; run twice, same bits."""
    try:
        first, second = run(), run()
        torch.cuda.synchronize()
        same = all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(first.values(), second.values()) if a.numel())
        if not same:
            failures.append(name)
            print("FAIL " + name + ": not the same bits twice")
        report(name, first, exacts, dtypes)
    except Exception as e:
        failures.append(name)
        print("FAIL " + name, e)
        traceback.print_exc()


def randn(*shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(*shape, device="cuda") * scale).to(dtype)


# ------------------------------------------------------------------------------- norms


def norm_forward_constants(width, dtype):
    v = vec(width, dtype)
    pieces = width // v
    most = 256 // (v * torch.empty(0, dtype=dtype).element_size())
    lanes = max(1, min(32, pow2(pieces) // 2))
    if pieces > 32 * most:
        lanes = max(64, min(1024, pow2(up(pieces, most))))
    return dict(WIDTH=width, VEC=v, LANES=lanes, THREADS=max(lanes, 128) if lanes <= 32 else lanes, CHUNKS=up(pieces, lanes))


def norm_backward_constants(width, dtype):
    v = vec(width, dtype)
    lanes = max(1, min(512, pow2(up(width, 8)), pow2(width // v)))
    return dict(WIDTH=width, VEC=v, LANES=lanes, THREADS=lanes if lanes > 32 else 128, CHUNKS=up(width // v, lanes))


def parts_of(rows, d):
    groups = d["THREADS"] // d["LANES"]
    resident = max(1, 768 // d["THREADS"])
    parts = max(1, min(SM * resident, up(rows, groups)))
    per = up(rows, parts)
    return up(rows, per), per


def sum_parts(parts, out, add, dtype=torch.float32):
    count, width = parts.shape
    kernel("sum_parts", "sum_parts", dtype)([up(width, 32), 1], [32, 32], parts, out, long(count), long(width), long(count), int(add))


def rms_forward(x, w, y, inverse, eps=1e-5):
    rows, width = x.shape
    d = norm_forward_constants(width, x.dtype)
    kernel("rms_norm", "rms_norm_forward", x.dtype, **d)(
        [up(rows, d["THREADS"] // d["LANES"])], [d["THREADS"]], x, w, y, inverse, long(rows), eps)


def rms_backward(x, dy, w, inverse, dx, dw, parts, add):
    rows, width = x.shape
    d = norm_backward_constants(width, x.dtype)
    count, per = parts_of(rows, d)
    kernel("rms_norm", "rms_norm_backward", x.dtype, **d)(
        [count], [d["THREADS"]], x, dy, w, inverse, dx, parts, long(rows), long(per), int(add))
    sum_parts(parts[:count], dw, add)


def layer_forward(x, w, b, y, moments, eps=1e-5):
    rows, width = x.shape
    d = norm_forward_constants(width, x.dtype)
    kernel("layer_norm", "layer_norm_forward", x.dtype, **d)(
        [up(rows, d["THREADS"] // d["LANES"])], [d["THREADS"]], x, w, b, y, moments, long(rows), eps)


def layer_backward(x, dy, w, moments, dx, dw, db, parts, add):
    rows, width = x.shape
    d = norm_backward_constants(width, x.dtype)
    count, per = parts_of(rows, d)
    kernel("layer_norm", "layer_norm_backward", x.dtype, **d)(
        [count], [d["THREADS"]], x, dy, w, moments, dx, parts[0], parts[1], long(rows), long(per), int(add))
    sum_parts(parts[0][:count], dw, add)
    sum_parts(parts[1][:count], db, add)


def test_norms():
    for dtype in (torch.bfloat16, torch.float32):
        for rows, width in [(1, 2048), (3, 7), (70001, 64), (70001, 128), (5, 100), (257, 4096), (33, 12288), (517, 768), (9, 2), (4, 20000), (65, 8192), (1000, 1001), (300, 256), (70001, 2048)]:
            for add in (False, True):
                x, w, b, dy = randn(rows, width, dtype=dtype) + 0.25, randn(width, dtype=dtype), randn(width, dtype=dtype), randn(rows, width, dtype=dtype)
                x = x.to(dtype)
                old, old_w = randn(rows, width, dtype=dtype), randn(width)
                X, W, B, DY = (t.to(F64).requires_grad_() for t in (x, w, b, dy))
                eps = ctypes.c_float(1e-5).value
                R = 1 / (X.pow(2).mean(-1, keepdim=True) + eps).sqrt()
                Y = X * R * W
                gx, gw = torch.autograd.grad(Y, (X, W), DY.detach())
                if add:
                    gx, gw = gx + old.to(F64), gw + old_w.to(F64)
                parts = poison((2, SM * 12, width), torch.float32)

                def run():
                    y, r = poison((rows, width), dtype), poison((rows,), torch.float32)
                    dx = old.clone() if add else poison((rows, width), dtype)
                    dw = old_w.clone() if add else poison((width,), torch.float32)
                    rms_forward(x, w, y, r)
                    rms_backward(x, dy, w, r, dx, dw, parts[0], add)
                    return dict(y=y, r=r, dx=dx, dw=dw)

                case(f"rms_norm {dtype} {rows}x{width} add {add}", run, [Y.detach(), R.detach()[:, 0], gx, gw], [dtype, torch.float32, dtype, torch.float32])

                Y = torch.nn.functional.layer_norm(X, (width,), W, B, eps)
                gx, gw, gb = torch.autograd.grad(Y, (X, W, B), DY.detach())
                if add:
                    gx, gw, gb = gx + old.to(F64), gw + old_w.to(F64), gb + old_w.to(F64)

                def run():
                    y, m = poison((rows, width), dtype), poison((rows, 2), torch.float32)
                    dx = old.clone() if add else poison((rows, width), dtype)
                    dw = old_w.clone() if add else poison((width,), torch.float32)
                    db = old_w.clone() if add else poison((width,), torch.float32)
                    layer_forward(x, w, b, y, m)
                    layer_backward(x, dy, w, m, dx, dw, db, parts, add)
                    return dict(y=y, dx=dx, dw=dw, db=db)

                if width > 1:
                    case(f"layer_norm {dtype} {rows}x{width} add {add}", run, [Y.detach(), gx, gw, gb], [dtype, dtype, torch.float32, torch.float32])


# ------------------------------------------------------------------------- elementwise


def pointwise(file, entry, dtype, n, *args):
    v = 16 // torch.empty(0, dtype=dtype).element_size()
    kernel(file, entry, dtype)([up(up(n, v), 256)], [256], *args, long(n))


def test_elementwise():
    import torch.nn.functional as F

    for dtype in (torch.bfloat16, torch.float32):
        for n in (1, 7, 8, 9, 70001, 1 << 20):
            x, u, dy = (randn(n, dtype=dtype, scale=3.0) for _ in range(3))
            X, U, DY = (t.to(F64).requires_grad_() for t in (x, u, dy))
            for file, name, f in [
                ("sigmoid", "sigmoid", torch.sigmoid),
                ("gelu", "gelu_tanh", lambda t: F.gelu(t, approximate="tanh")),
                ("gelu", "gelu_exact", F.gelu),
            ]:
                Y = f(X)
                def run():
                    y, dx = poison((n,), dtype), dy.clone()
                    pointwise(file, name + "_forward", dtype, n, x, y)
                    pointwise(file, name + "_backward", dtype, n, dx, y if name == "sigmoid" else x, dx)
                    return dict(y=y, dx=dx)
                (gx,) = torch.autograd.grad(Y, X, DY.detach())
                if name == "sigmoid":  # computed from the stored y
                    s = Y.detach().to(dtype).to(F64)
                    gx = DY.detach() * s * (1 - s)
                case(f"{name} {dtype} {n}", run, [Y.detach(), gx], [dtype, dtype])
            Y = F.silu(X) * U
            gg, gu = torch.autograd.grad(Y, (X, U), DY.detach())

            def run():
                y, dg, du = poison((n,), dtype), poison((n,), dtype), dy.clone()
                pointwise("swiglu", "swiglu_forward", dtype, n, x, u, y)
                pointwise("swiglu", "swiglu_backward", dtype, n, du, x, u, dg, du)
                return dict(y=y, d_gate=dg, d_up=du)

            case(f"swiglu {dtype} {n}", run, [Y.detach(), gg, gu], [dtype] * 3)
        edge = torch.tensor([0.0, -0.0, 88.0, -88.0, 104.0, -104.0, 3e38, -3e38, float("inf"), float("-inf"), float("nan")], device="cuda").to(dtype)
        y = poison(edge.shape, dtype)
        pointwise("sigmoid", "sigmoid_forward", dtype, len(edge), edge, y)
        print("     sigmoid of", edge.tolist(), "is", y.tolist())
        pointwise("gelu", "gelu_exact_forward", dtype, len(edge), edge, y)
        print("     gelu exact", y.tolist())
        pointwise("gelu", "gelu_tanh_forward", dtype, len(edge), edge, y)
        print("     gelu tanh ", y.tolist())


def rope(x, out, positions, inv, factor, sign):
    tokens, heads, dim = x.shape
    half = dim // 2
    v = vec(half, x.dtype)
    threads = tokens * (half // v)
    per = max(1, min(heads, 8, heads * threads // (SM * 2048)))
    kernel("rope", "rope", x.dtype, HALF=half, VEC=v)(
        [up(threads, 128), up(heads, per)], [128], x, out, positions, inv, float(factor), float(sign), long(tokens), heads, per)


def test_rope():
    for dtype in (torch.bfloat16, torch.float32):
        for tokens, heads, dim in [(1, 3, 64), (1000, 5, 128), (70001, 2, 64), (3, 1, 2), (50, 4, 6), (65536, 8, 128), (9, 64, 256), (12, 2, 96), (5, 3, 192)]:
            x = randn(tokens, heads, dim, dtype=dtype)
            positions = torch.randint(0, 1 << 20, (tokens,), device="cuda", dtype=torch.int32)
            positions[0] = 0
            inv = (1 / 500000.0 ** (torch.arange(0, dim, 2, device="cuda", dtype=torch.float32) / dim))
            angle = (positions.float()[:, None] * inv).to(F64)[:, None]
            factor = 1.25
            for sign in (1, -1):
                a, b = x.to(F64).chunk(2, -1)
                c, s = angle.cos() * factor, sign * angle.sin() * factor
                exact = torch.cat([a * c - b * s, b * c + a * s], -1)

                def run():
                    out = poison(x.shape, dtype)
                    rope(x, out, positions, inv, factor, sign)
                    inplace = x.clone()
                    rope(inplace, inplace, positions, inv, factor, sign)
                    return dict(out=out, inplace=inplace)

                case(f"rope {dtype} {tokens}x{heads}x{dim} sign {sign}", run, [exact, exact], [dtype, dtype])


# ------------------------------------------------------------------------------- rows


def sort(keys, limit, inverse=None):
    n = keys.numel()
    tiles = up(n, 2048)
    counts = poison((256 * tiles,), torch.int32)
    bits = limit.bit_length()
    places = None
    for shift in range(0, max(bits, 1), 8):
        last = shift + 8 >= bits
        out, order = poison((n,), torch.int32), poison((n,), torch.int32)
        kernel("sort", "sort_count", torch.float32)([tiles], [256], keys, counts, long(n), limit, shift)
        kernel("sort", "sort_scan", torch.float32)([1], [1024], counts, long(256 * tiles))
        kernel("sort", "sort_scatter", torch.float32)([tiles], [256], keys, places, counts, out, order, inverse if last else None, long(n), limit, shift)
        keys, places = out, order
    starts = poison((limit + 1,), torch.int32)
    kernel("sort", "sort_starts", torch.float32)([up(limit + 1, 256)], [256], keys, starts, long(n), long(limit))
    return keys, places, starts


def embedding_forward(table, ids, y):
    vocab, width = table.shape
    v = vec(width, table.dtype)
    kernel("embedding", "embedding_forward", table.dtype, WIDTH=width, VEC=v)([up(len(ids) * (width // v), 256)], [256], table, ids, y, long(len(ids)), long(vocab))


def embedding_backward(dy, ids, total, add):
    vocab, width = total.shape
    v = min(4, vec(width, dy.dtype))
    keys, order, starts = sort(ids, vocab)
    end = (order, starts, total, long(vocab), int(add))
    k = lambda name: kernel("embedding", name, dy.dtype, WIDTH=width, VEC=v)
    k("embedding_few")([up(vocab * up(width // v, 4), 256)], [256], dy, *end)
    k("embedding_many")([up(len(ids), 32), up(width // v, 32)], [256], dy, keys, *end)
    k("embedding_most")([up(len(ids), 1024), up(width // v, 32)], [1024], dy, keys, *end)


def zipf(tokens, vocab):
    weights = 1 / torch.arange(1, vocab + 1, dtype=torch.float32, device="cuda")
    ids = torch.multinomial(weights, tokens, replacement=True)
    return torch.randperm(vocab, device="cuda")[ids].to(torch.int32)


def test_rows():
    for dtype in (torch.bfloat16, torch.float32):
        for vocab, width, ids in [
            (7, 5, torch.randint(0, 7, (1,))),
            (7, 5, torch.randint(0, 7, (3000,))),
            (300, 64, torch.zeros(5000)),
            (256, 64, torch.full((33,), 255)),
            (1, 8, torch.zeros(40)),
            (9, 132, torch.randint(0, 9, (66000,))),
            (300, 20, (torch.rand(30001) ** 6 * 300).floor()),
            (50257, 768, zipf(70001, 50257)),
            (1000, 100, zipf(4097, 1000)),
            (1000, 12, torch.arange(1000)),
            (70000, 16, zipf(20000, 70000)),
        ]:
            ids = ids.to(device="cuda", dtype=torch.int32)
            table, dy = randn(vocab, width, dtype=dtype), randn(len(ids), width, dtype=dtype)
            for add in (False, True):
                old = randn(vocab, width)
                exact = torch.zeros(vocab, width, dtype=F64, device="cuda").index_add_(0, ids.long(), dy.to(F64))
                if add:
                    exact += old.to(F64)

                def run():
                    y = poison((len(ids), width), dtype)
                    total = old.clone() if add else poison((vocab, width), torch.float32)
                    embedding_forward(table, ids, y)
                    embedding_backward(dy, ids, total, add)
                    return dict(y=y, sum=total)

                case(f"embedding {dtype} {vocab}x{width} tokens {len(ids)} add {add}", run, [table[ids.long()], exact], [dtype, torch.float32])
        bad = torch.tensor([3, -1, 7, 2**31 - 1, -(2**31), 0], dtype=torch.int32, device="cuda")
        table, y, total = randn(7, 8, dtype=dtype), poison((6, 8), dtype), poison((7, 8), torch.float32)
        embedding_forward(table, bad, y)
        embedding_backward(torch.ones(6, 8, dtype=dtype, device="cuda"), bad, total, False)
        right = y.isnan().all(1).tolist() == [False, True, True, True, True, False] and total[:, 0].tolist() == [1, 0, 0, 1, 0, 0, 0]
        print("ok   " if right else "FAIL ", "ids out of range", y[:, 0].tolist(), total[:, 0].tolist())
        if not right:
            failures.append("ids out of range")

        for tokens, experts, top_k, width in [(1, 4, 2, 8), (70001, 64, 6, 64), (1000, 7, 7, 5), (513, 160, 6, 256), (300, 8, 1, 12)]:
            # The weight of a single expert over itself is 1, whatever its logits.
            for normalise in (False, True) if top_k > 1 else (False,):
                # Coarse, so that probabilities are equal only where logits are.
                logits = ((randn(tokens, experts, scale=2.0) * 64).round() / 64).to(dtype)
                if tokens > 200:
                    logits[5] = 0.5
                    logits[6] = float("nan") if tokens == 513 else logits[6]
                kept = [t for t in range(min(tokens, 200)) if not (tokens == 513 and t == 6)]
                L = logits.to(F64).requires_grad_()
                P = L.softmax(-1)
                # Ties: lower index first, by a stable sort.
                chosen = logits.float().sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
                w = P.gather(1, chosen)
                if normalise:
                    w = w / w.sum(1, keepdim=True)
                counts = torch.bincount(chosen.flatten(), minlength=experts).to(F64)
                load = counts * experts / (tokens * top_k)
                balance = (P.mean(0) * load).sum()
                dw, db = randn(tokens, top_k, dtype=dtype), 0.75
                d_balance = torch.tensor([db], device="cuda")
                (gl,) = torch.autograd.grad((w * dw.to(F64)).sum() + db * balance, L)

                def run():
                    p, e, wo = poison((tokens, experts), torch.float32), poison((tokens, top_k), torch.int32), poison((tokens, top_k), dtype)
                    kernel("moe_route", "moe_route_forward", dtype, EXPERTS=experts)([up(tokens, 4)], [128], logits, p, e, wo, long(tokens), top_k, int(normalise))
                    rows = poison((tokens * top_k,), torch.int32)
                    keys, pairs, starts = sort(e.flatten(), experts, rows)
                    parts, sums = poison((up(tokens, 1024), experts), torch.float32), poison((experts,), torch.float32)
                    kernel("sum_parts", "sum_parts", torch.float32)([up(experts, 32), up(tokens, 1024)], [32, 32], p, parts, long(tokens), long(experts), long(1024), 0)
                    sum_parts(parts, sums, False)
                    lo, ba, dl = poison((experts,), torch.float32), poison((1,), torch.float32), poison((tokens, experts), dtype)
                    kernel("moe_route", "moe_route_balance", dtype, EXPERTS=experts)([1], [32], sums, starts, lo, ba, long(tokens), long(tokens * top_k))
                    kernel("moe_route", "moe_route_backward", dtype, EXPERTS=experts)([up(tokens, 4)], [128], p, lo, e, dw, d_balance, dl, long(tokens), top_k, int(normalise))
                    return dict(p=p, e=e, w=wo, pairs=pairs, rows=rows, starts=starts, load=lo, balance=ba, dl=dl)

                out = run()
                if tokens == 513:
                    print("     a row of NaN picks", out["e"][6].tolist())
                    logits[6] = 0.0
                    L.data[6] = 0.0
                    P = L.softmax(-1)
                    chosen = logits.float().sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
                    w = P.gather(1, chosen)
                    w = w / w.sum(1, keepdim=True) if normalise else w
                    counts = torch.bincount(chosen.flatten(), minlength=experts).to(F64)
                    load = counts * experts / (tokens * top_k)
                    balance = (P.mean(0) * load).sum()
                    (gl,) = torch.autograd.grad((w * dw.to(F64)).sum() + db * balance, L)
                order = chosen.flatten().sort(stable=True).indices
                inverse = torch.empty_like(order)
                inverse[order] = torch.arange(len(order), device="cuda")
                starts = torch.cat([torch.zeros(1, device="cuda"), counts.cumsum(0)])
                f = torch.float32
                case(f"moe_route {dtype} {tokens} experts {experts} top {top_k} normalise {normalise}", run,
                     [P.detach(), chosen, w.detach(), order, inverse, starts, load, balance.detach()[None], gl], [f, F64, dtype, F64, F64, F64, f, f, dtype])
                out = run()
                pairs, rows, weights = out["pairs"], out["rows"], randn(tokens, top_k, dtype=dtype)
                x, big = randn(tokens, width, dtype=dtype), randn(tokens * top_k, width, dtype=dtype)
                old, dy = randn(tokens, width, dtype=dtype), randn(tokens, width, dtype=dtype)
                v = vec(width, dtype)
                g = dict(WIDTH=width, VEC=v)

                def run():
                    y, dx, z = poison((tokens * top_k, width), dtype), old.clone(), poison((tokens, width), dtype)
                    dx0, dbig, dwe = poison((tokens, width), dtype), poison(big.shape, dtype), poison((tokens, top_k), dtype)
                    t = tokens * (width // v)
                    kernel("gather_rows", "gather_rows_forward", dtype, **g)([up(t, 256)], [256], x, rows, y, long(tokens), top_k)
                    kernel("gather_rows", "gather_rows_backward", dtype, **g)([up(t, 256)], [256], big, rows, dx, long(tokens), top_k, 1)
                    kernel("gather_rows", "gather_rows_backward", dtype, **g)([up(t, 256)], [256], big, rows, dx0, long(tokens), top_k, 0)
                    kernel("scatter_rows", "scatter_rows_forward", dtype, **g)([up(t, 256)], [256], big, weights, rows, z, long(tokens), top_k)
                    kernel("scatter_rows", "scatter_rows_backward", dtype, **g)([up(tokens, 8)], [256], dy, big, weights, rows, dbig, dwe, long(tokens), top_k)
                    return dict(y=y, dx=dx, dx0=dx0, z=z, dbig=dbig, dw=dwe)

                token = order // top_k
                by_pair = big.to(F64)[inverse].view(tokens, top_k, width)
                case(f"gather/scatter rows {dtype} {tokens} top {top_k} width {width}", run, [
                    x[token], by_pair.sum(1) + old.to(F64), by_pair.sum(1), (by_pair * weights.to(F64)[..., None]).sum(1),
                    weights.to(F64).flatten()[order][:, None] * dy.to(F64)[token], (by_pair * dy.to(F64)[:, None]).sum(-1)], [dtype] * 6)


# ---------------------------------------------------------------------------- compress


def test_compress():
    for dtype in (torch.bfloat16, torch.float32):
        for lengths, heads, dim, l, d in [
            ([1], 1, 8, 32, 16), ([32], 2, 64, 32, 16), ([31, 0, 33, 500, 47, 48, 3], 3, 20, 32, 16), ([4096, 1001], 4, 128, 32, 16),
            ([100, 7, 64], 2, 64, 16, 16), ([300], 2, 7, 24, 4), ([90], 1, 32, 8, 1), ([70001], 1, 64, 64, 32),
        ]:
            tokens = sum(lengths)
            cu, starts, counts = [0], [], [0]
            for n in lengths:
                blocks = 0 if n < l else (n - l) // d + 1
                starts += [cu[-1] + i * d for i in range(blocks)]
                counts.append(counts[-1] + blocks)
                cu.append(cu[-1] + n)
            rows = len(starts)
            as_int = lambda v: torch.tensor(v, dtype=torch.int32, device="cuda")
            cu_t, cu_n = as_int(cu), as_int(counts)
            v = vec(dim, dtype)
            g = dict(BLOCK=l, STRIDE=d, HEADS=heads, DIM=dim, VEC=v)
            x, dy = randn(tokens, heads, dim, dtype=dtype), randn(rows, heads, dim, dtype=dtype)
            at = (torch.tensor(starts, dtype=torch.long, device="cuda")[:, None] + torch.arange(l, device="cuda")).view(-1)
            blocks = x[at].view(rows, l, heads, dim)
            mean = blocks.to(F64).mean(1)
            dmean = torch.zeros(tokens, heads, dim, dtype=F64, device="cuda").index_add_(0, at, (dy.to(F64) / l)[:, None].expand(rows, l, heads, dim).reshape(-1, heads, dim))
            flat = blocks.permute(2, 0, 1, 3).reshape(heads, rows, l * dim)
            d_flat = randn(heads, rows, l * dim)
            dx = torch.zeros(tokens, heads, dim, dtype=F64, device="cuda").index_add_(0, at, d_flat.to(F64).view(heads, rows, l, dim).permute(1, 2, 0, 3).reshape(-1, heads, dim))
            shift = randn(heads, dim)
            z = randn(heads, rows, dim)
            chunk = max(1, rows // 3)
            reach = l // d

            def run():
                out, dxm = poison((rows, heads, dim), dtype), poison((tokens, heads, dim), dtype)
                seqs = len(lengths)
                width = heads * dim // v
                launch = lambda name, n, *args, y=1: kernel("compress", name, dtype, **g)([up(n, 128), y], [128], *args) if n else None
                launch("compress_mean_forward", up(rows, 4) * width, x, out, cu_t, cu_n, seqs, long(rows))
                launch("compress_mean_backward", up(tokens, 16) * width, dy, dxm, cu_t, cu_n, seqs, long(tokens))
                gathered = poison((heads, rows, l * dim), dtype)
                for first in range(0, rows, chunk):
                    n = min(chunk, rows - first)
                    part = poison((heads, n, l * dim), dtype)
                    launch("compress_gather", n * l * (dim // v), x, part, cu_t, cu_n, seqs, long(first), long(n), y=heads)
                    gathered[:, first:first + n] = part
                # d_blocks of a chunk with those before it that reach into it; its tokens in order.
                dx2 = poison((tokens, heads, dim), dtype)
                begin = lambda n: 0 if n == 0 else starts[n] if n < rows else tokens
                if rows == 0:
                    dx2.zero_()
                for first in range(0, rows, chunk):
                    last = min(first + chunk, rows)
                    lead = max(0, first - reach + 1)
                    lo, hi = begin(first), begin(last)
                    launch("compress_scatter", (hi - lo) * (dim // v), d_flat[:, lead:last].contiguous(), dx2, cu_t, cu_n, seqs,
                           long(lead), long(last - lead), long(lo), long(hi), y=heads)
                fin = poison((rows, heads, dim), dtype)
                launch("compress_finish", rows * (dim // v), z, shift, fin, long(0), long(rows), y=heads)
                return dict(mean=out, dx=dxm, gather=gathered, scatter=dx2, finish=fin)

            case(f"compress {dtype} {lengths} heads {heads} dim {dim} l {l} d {d}", run,
                 [mean, dmean, flat, dx, (z.to(F64) + shift.to(F64)[:, None]).transpose(0, 1)], [dtype] * 5)

        heads, inner, outer, count = 3, 500, 72, 301
        pe, weight, bias = randn(heads, inner, dtype=dtype), randn(heads, inner, outer, dtype=dtype), randn(heads, outer, dtype=dtype)
        hidden, d_active, columns = randn(heads, count, outer), randn(heads, count, outer), randn(heads, outer)
        old = randn(heads, inner, outer)
        PE, W, C = pe.to(F64), weight.to(F64), columns.to(F64)
        plain64 = (PE[:, None] @ W)[:, 0]
        shift64 = plain64 + bias.to(F64)
        s32 = shift64.float()
        Z = (hidden.to(F64) + s32.to(F64)[:, None]).requires_grad_()
        A = torch.nn.functional.gelu(Z)
        (dz,) = torch.autograd.grad(A, Z, d_active.to(F64))

        def run():
            shift, plain = poison((heads, outer), torch.float32), poison((heads, outer), torch.float32)
            active, d_hidden = poison(hidden.shape, dtype), poison(hidden.shape, dtype)
            dw, dpe, wide = old.clone(), poison((heads, inner), torch.float32), d_active.clone()
            k = lambda name: kernel("compress_phi", name, dtype)
            k("compress_shift")([up(outer, 32), heads], [32, 32], pe, weight, bias, shift, long(inner), outer)
            k("compress_shift")([up(outer, 32), heads], [32, 32], pe, weight, None, plain, long(inner), outer)
            k("compress_hidden_forward")([up(count * outer, 256), heads], [256], hidden, s32, active, long(count), outer)
            k("compress_hidden_backward")([up(count * outer, 256), heads], [256], hidden, s32, wide, d_hidden, long(count), outer)
            k("compress_pe_grads")([up(inner, 8), heads], [256], pe, weight, columns, dw, dpe, long(inner), outer)
            return dict(shift=shift, plain=plain, active=active, d_hidden=d_hidden, wide=wide, dw=dw, dpe=dpe)

        f = torch.float32
        case(f"phi {dtype}", run, [shift64, plain64, A.detach(), dz, dz, old.to(F64) + PE[..., None] * C[:, None], (W @ C[..., None])[..., 0]], [f, f, dtype, dtype, f, f, f])


if __name__ == "__main__":
    torch.manual_seed(1)
    for test in (test_elementwise, test_rope, test_rows, test_compress, test_norms):
        try:
            test()
        except Exception as e:
            failures.append(test.__name__)
            print("FAIL", test.__name__, e)
            traceback.print_exc()
    print("ALL RIGHT" if not failures else f"{len(failures)} FAILED: {failures}")
