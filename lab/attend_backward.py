"""`attend` backward on Hopper: gradients checked against float64 autograd, repeats, then times.

    python lab/attend_backward.py [check] [time]        # on a Hopper GPU
    python lab/attend_backward.py compile               # anywhere: registers and spills of all kernels
"""
import ctypes
import math
import sys

import torch
from cuda.bindings import driver

from harness import ROOT, TYPES, Kernel, Map, compile_cubin, median_ms, sequences

HOPPER = ROOT / "crates/attention/src/cuda/hopper"
KEYS, QUERIES, DELTA = (HOPPER / f"{n}.cu" for n in ("attend_backward_keys", "attend_backward_queries", "delta"))
CAUSAL, COMPRESSED, WINDOW = range(3)
NAMES = ("causal", "compressed", "window")
LOG2E = 1.4426950408889634
PLAIN = driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_NONE
pad = lambda x: -(-x // 64) * 64
blocks = lambda n, block, stride: 0 if n < block else (n - block) // stride + 1


def keys_constants(d, v, mask, dtype):
    """Defines, keys a block, bytes of shared memory."""
    keys = 64 if max(d, v) > 128 else 128
    stages = 2 if d + v > 256 else 3
    shared = keys * (pad(d) + pad(v)) * 2 + stages * (64 * (pad(d) + pad(v)) * 2 + 1024)
    shared += (16384 if keys == 64 else 16) + 8 * (5 + 2 * stages)
    return {TYPES[dtype]: 1, "D": d, "V": v, "MASK": mask, "STAGES": stages}, keys, shared


def queries_constants(d, v, mask, dtype):
    bn = 128 if d <= 64 and v <= 128 else 96 if d <= 128 and v <= 128 else 64 if d <= 192 else 32
    if mask == WINDOW:  # few keys: small tiles waste little, and the next queries come while these are walked
        bn = min(bn, 64)
    row = (pad(d) + pad(v)) * 2
    size = lambda q, stages: (128 * q + stages * bn) * row + 256
    q, stages = next(x for x in ((2, 3), (1, 3), (1, 2)) if size(*x) <= 227 * 1024)
    defines = {TYPES[dtype]: 1, "D": d, "V": v, "MASK": mask, "BN": bn, "Q_STAGES": q, "K_STAGES": stages,
               "V_STAGES": stages}
    return defines, bn, size(q, stages)


def parts_of(tiles, group, kv_heads, query_tiles):
    """Over how many blocks a tile's heads and queries are split: from shapes alone."""
    enough = lambda n: tiles * kv_heads * n >= 1024
    heads = next(n for n in range(1, group + 1) if group % n == 0 and (enough(n) or n == group))
    ranges = 1
    while tiles * kv_heads * heads * ranges < 256 and query_tiles >= 32 * ranges:
        ranges *= 2
    return heads, ranges


class KeysParams(ctypes.Structure):
    _fields_ = [("sequences", ctypes.c_uint64), ("count", ctypes.c_int), ("_", ctypes.c_int), ("tile_count", ctypes.c_int),
                ("group", ctypes.c_int), ("kv_heads", ctypes.c_int), ("head_parts", ctypes.c_int), ("range_parts", ctypes.c_int),
                ("scale_log2", ctypes.c_float), ("scale", ctypes.c_float), ("window", ctypes.c_int),
                ("block", ctypes.c_int), ("stride", ctypes.c_int), ("dk", ctypes.c_uint64),
                ("dv", ctypes.c_uint64), ("dk_parts", ctypes.c_uint64), ("dv_parts", ctypes.c_uint64),
                ("keys", ctypes.c_int64), ("not_finite", ctypes.c_uint64)]


class QueriesParams(ctypes.Structure):
    _fields_ = [("sequences", ctypes.c_uint64), ("count", ctypes.c_int), ("_", ctypes.c_int), ("tile_count", ctypes.c_int),
                ("heads", ctypes.c_int), ("group", ctypes.c_int), ("kv_heads", ctypes.c_int), ("scale_log2", ctypes.c_float),
                ("scale", ctypes.c_float), ("window", ctypes.c_int), ("block", ctypes.c_int),
                ("stride", ctypes.c_int), ("rows", ctypes.c_uint64), ("tokens", ctypes.c_int),
                ("first", ctypes.c_int), ("last", ctypes.c_int), ("dq", ctypes.c_uint64), ("sum", ctypes.c_uint64), ("not_finite", ctypes.c_uint64)]


class DeltaParams(ctypes.Structure):
    _fields_ = [("d_out", ctypes.c_uint64), ("branch", ctypes.c_uint64 * 3), ("gate", ctypes.c_uint64),
                ("d_gate", ctypes.c_uint64), ("delta", ctypes.c_uint64), ("rows", ctypes.c_int64)]


class RowsParams(ctypes.Structure):
    _fields_ = [("lse", ctypes.c_uint64), ("delta", ctypes.c_uint64), ("gate", ctypes.c_uint64),
                ("gate_index", ctypes.c_int), ("tokens", ctypes.c_int), ("heads", ctypes.c_int),
                ("_", ctypes.c_int), ("rows", ctypes.c_uint64)]


address = lambda x: 0 if x is None else x.data_ptr()
_made = {}


def made(path, entry, defines, shared=0):
    key = (path.name, entry, tuple(defines.items()))
    if key not in _made:
        _made[key] = Kernel(path, entry, defines, shared)
    return _made[key]


class Delta:
    """δ, Δ and the gates' gradient; then the table of a branch."""

    def __init__(self, v, dtype):
        defines = {TYPES[dtype]: 1, "V": v}
        self.v = v
        self.delta_kernel, self.rows_kernel = (made(DELTA, e, defines) for e in ("delta", "rows"))

    def delta(self, d_out, branches, gate, d_gate, delta):
        rows = d_out.shape[0] * d_out.shape[1]
        lanes = next(x for x in (8, 16, 32) if self.v // 8 <= x)
        three = (ctypes.c_uint64 * 3)(*[address(b) for b in branches])
        params = DeltaParams(address(d_out), three, address(gate), address(d_gate), address(delta), rows)
        grid = (-(-rows * lanes // 256),)
        return lambda: self.delta_kernel(grid, (256,), params)

    def rows(self, lse, delta, gate, index, table):
        t, h = lse.shape
        params = RowsParams(address(lse), address(delta), address(gate), index, t, h, 0, address(table))
        return lambda: self.rows_kernel((-(-t // 32), -(-h // 32)), (256,), params)


class Backward:
    def __init__(self, d, v, mask, dtype=torch.bfloat16):
        self.d, self.v, self.mask, self.dtype = d, v, mask, dtype
        defines, self.key_rows, shared = keys_constants(d, v, mask, dtype)
        self.keys_kernel = made(KEYS, "attend_backward_keys", defines, shared)
        self.sum_kernel = made(KEYS, "attend_backward_sum", defines)
        defines, self.bn, shared = queries_constants(d, v, mask, dtype)
        self.queries_kernel = made(QUERIES, "attend_backward_queries", defines, shared)

    def keys(self, q, k, v, d_out, table, lengths, dk, dv, window, block, stride):
        t, h, d = q.shape
        n, kv = k.shape[:2]
        table_of = sequences(lengths, block, stride)
        tiles = n // self.key_rows + len(lengths)
        heads, ranges = parts_of(tiles, h // kv, kv, max(lengths) // 64)
        parts = heads * ranges
        dk_parts = torch.full((parts, *dk.shape), math.nan, device="cuda") if parts > 1 else None
        dv_parts = torch.full((parts, *dv.shape), math.nan, device="cuda") if parts > 1 else None
        params = KeysParams(address(table_of), len(lengths), 0, tiles, h // kv, kv, heads, ranges, LOG2E / math.sqrt(d),
                            1 / math.sqrt(d), window, block, stride, address(dk), address(dv), address(dk_parts),
                            address(dv_parts), n)
        maps = (Map(k, (64, 1, self.key_rows)), Map(v, (64, 1, self.key_rows)), Map(q, (64, 1, 64)),
                Map(d_out, (64, 1, 64)), Map(table, (4, 64, 1), PLAIN))

        def run():
            self.keys_kernel((tiles * parts * kv,), (384,), *maps, params)
            if parts > 1:
                for part, out in ((dk_parts, dk), (dv_parts, dv)):
                    size = out.numel()
                    self.sum_kernel((-(-size // 1024),), (256,), part, out, ctypes.c_int64(size), parts)
            return table_of

        self.parts = heads, ranges
        return run

    def queries(self, q, k, v, d_out, table, lengths, dq, window, block, stride, first=1, last=1, total=None):
        t, h, d = q.shape
        kv = k.shape[1]
        table_of = sequences(lengths, block, stride)
        tiles = t // 128 + len(lengths)
        params = QueriesParams(address(table_of), len(lengths), 0, tiles, h, h // kv, kv, LOG2E / math.sqrt(d), 1 / math.sqrt(d),
                               window, block, stride, address(table), t, first,
                               last, address(dq), address(total))
        maps = (Map(q, (64, 1, 128)), Map(d_out, (64, 1, 128)), Map(k, (64, 1, self.bn)), Map(v, (64, 1, self.bn)))
        grid = (min(tiles * h, torch.cuda.get_device_properties(0).multi_processor_count),)
        return lambda: (self.queries_kernel(grid, (384,), *maps, params), table_of)


def formula(q, k, v, gate, lengths, mask, dtype, window, block, stride):
    """Branch output [T, H, V], its lse, and the gated output, in `dtype`."""
    t, h, d = q.shape
    g = h // k.shape[1]
    q, k, v = (x.to(dtype) for x in (q, k, v))
    outs, lses, token, key = [], [], 0, 0
    for n in lengths:
        m = blocks(n, block, stride) if mask == COMPRESSED else n
        qs = q[token:token + n].transpose(0, 1)
        ks = k[key:key + m].transpose(0, 1).repeat_interleave(g, 0)
        vs = v[key:key + m].transpose(0, 1).repeat_interleave(g, 0)
        p = torch.arange(n, device=q.device)[:, None]
        j = torch.arange(m, device=q.device)[None]
        see = {CAUSAL: j <= p, WINDOW: (j <= p) & (j > p - window), COMPRESSED: j * stride + block <= p + 1}[mask]
        s = (qs @ ks.transpose(1, 2)) * (1 / math.sqrt(d))
        lses.append(torch.logsumexp(s.double().masked_fill(~see, -math.inf), -1).transpose(0, 1))
        # A finite floor: rows that see nothing get weights of zero, and gradients of zero.
        w = torch.softmax(s.masked_fill(~see, -3e4), -1) * see if m else s
        outs.append((w @ vs).transpose(0, 1))
        token, key = token + n, key + m
    out = torch.cat(outs)
    return out, torch.cat(lses), out * gate.to(dtype)[..., None] if gate is not None else out


def gradients(q, k, v, gate, d_out, lengths, mask, dtype, window, block, stride):
    leaves = [x.to(dtype).detach().requires_grad_() for x in (q, k, v)]
    gates = gate.to(dtype).detach().requires_grad_() if gate is not None else None
    out, lse, y = formula(*leaves, gates, lengths, mask, dtype, window, block, stride)
    y.backward(d_out.to(dtype))
    grads = [x.grad if x.grad is not None else torch.zeros_like(x) for x in leaves]
    return out.detach(), lse.detach(), grads + ([gates.grad] if gates is not None else [])


HEADS = [(128, 128), (64, 64), (96, 96), (192, 128), (192, 192), (256, 256), (64, 128), (128, 64)]


def case(d, v, mask, dtype, h, kv, lengths, gated, window, block, stride, repeats=1, scale=2.0):
    t, m = sum(lengths), sum(blocks(n, block, stride) if mask == COMPRESSED else n for n in lengths)
    cuda = lambda *shape: torch.randn(*shape, device="cuda").to(dtype)
    q, k, x, d_out = cuda(t, h, d) * scale, cuda(max(m, 1), kv, d), cuda(max(m, 1), kv, v), cuda(t, h, v)
    gate = torch.rand(t, h, 3, device="cuda").to(dtype) if gated else None
    if gated:
        gate[::7] = 0
        gate[3::11] *= -1
    mine = gate[..., 1] if gated else None
    args = (lengths, mask)
    rest = (window, block, stride)
    out, lse, want = gradients(q, k, x, mine, d_out, *args, torch.float64, *rest)
    _, _, plain = gradients(q, k, x, mine, d_out, *args, dtype, *rest)
    branch, lse = out.to(dtype).contiguous(), lse.float().contiguous()
    nan = lambda like: torch.full_like(like, math.nan)
    delta, table = torch.full((3, t, h), math.nan, device="cuda"), torch.full((h, t, 4), math.nan, device="cuda")
    d_gate = torch.full((t, h, 3), math.nan, device="cuda").to(dtype) if gated else None
    pre, work = Delta(v, dtype), Backward(d, v, mask, dtype)
    index = 1 if gated else 0
    branches = [branch if i == index else None for i in range(3)]
    first = None
    for _ in range(repeats):
        dq, dk, dv = nan(q), nan(k), nan(x)
        pre.delta(d_out, branches, gate, d_gate, delta)()
        pre.rows(lse, delta[index], gate, index, table)()
        work.keys(q, k, x, d_out, table, lengths, dk, dv, *rest)()
        work.queries(q, k, x, d_out, table, lengths, dq, *rest)()
        torch.cuda.synchronize()
        dk[m:], dv[m:] = 0, 0  # a row that no key stands in
        got = [dq, dk, dv] + ([d_gate[..., 1]] if gated else [])
        if first is None:
            first = [g.clone() for g in got]
        elif not all(torch.equal(a, b) for a, b in zip(first, got)):
            return False, "other bits on a repeat"
    # Three branches: in dq itself, and in f32.
    again, thrice, total = dq.clone(), nan(q), torch.full((t, h, d), math.nan, device="cuda")
    for i in (1, 2):
        work.queries(q, k, x, d_out, table, lengths, again, *rest, first=0, last=int(i == 2))()
    for i in range(3):
        work.queries(q, k, x, d_out, table, lengths, thrice, *rest, first=int(i == 0), last=int(i == 2), total=total)()
    torch.cuda.synchronize()
    good, text = True, ""
    for name, g, w, p in zip(("dq", "dk", "dv", "dgate"), got, want, plain):
        norm = w.norm().item() + 1e-30
        error, bound = (g.double() - w).norm().item() / norm, 2 * (p.double() - w).norm().item() / norm + 1e-6
        good &= error <= bound
        text += f" {name} {error:.1e}/{bound:.1e}"
    bound = 2 * (plain[0].double() - want[0]).norm().item() / (want[0].norm().item() + 1e-30) + 1e-6
    sums = [(x.double() / 3 - want[0]).norm().item() / (want[0].norm().item() + 1e-30) for x in (again, thrice)]
    good &= max(sums) <= bound
    return good, text + f" of three {sums[0]:.1e} {sums[1]:.1e} parts {work.parts}"


def check(heads=HEADS):
    torch.manual_seed(1)
    right, wrong = 0, 0
    for dtype in (torch.bfloat16, torch.float16):
        for d, v in heads:
            if dtype == torch.float16 and (d, v) not in ((128, 128), (192, 128)):
                continue
            for mask in (CAUSAL, COMPRESSED, WINDOW):
                shapes = [(4, 2, [1], True), (8, 2, [300, 1, 0, 65, 129, 640], True), (3, 3, [1100], False),
                          (16, 1, [777, 1300], True)]
                for h, kv, lengths, gated in shapes:
                    repeats = 50 if lengths[0] == 777 else 2
                    try:
                        good, text = case(d, v, mask, dtype, h, kv, lengths, gated, 200, 32, 16, repeats)
                    except Exception as e:
                        good, text = False, f"{type(e).__name__} {str(e)[:300]}"
                    right, wrong = right + good, wrong + (not good)
                    print(f"{'ok  ' if good else 'FAIL'} {str(dtype)[6:]} d {d}/{v} {NAMES[mask]} h {h}/{kv} {lengths}"
                          f"{' gated' if gated else ''}:{text}", flush=True)
    print(f"{right} right, {wrong} wrong", flush=True)


def time_all(dims=((128, 128), (192, 128)), lengths=(8192, 32768, 65536), h=64, kv=4, masks=(0, 1, 2)):
    for d, v in dims:
        for n in lengths:
            q, d_out = (torch.randn(n, h, x, device="cuda", dtype=torch.bfloat16) for x in (d, v))
            for mask in masks:
                m = blocks(n, 32, 16) if mask == COMPRESSED else n
                k, x = (torch.randn(m, kv, y, device="cuda", dtype=torch.bfloat16) for y in (d, v))
                dq, dk, dv = (torch.empty_like(y) for y in (q, k, x))
                p = torch.arange(n, device="cuda").float()
                seen = {CAUSAL: p + 1, COMPRESSED: ((p - 15) / 16).floor(), WINDOW: (p + 1).clamp(max=512)}[mask]
                lse = (torch.log(seen.clamp(min=0)) + 0.5)[:, None].expand(n, h).contiguous()
                gate = torch.rand(n, h, 3, device="cuda").to(torch.bfloat16)
                delta, table = torch.zeros(3, n, h, device="cuda"), torch.empty(h, n, 4, device="cuda")
                pre, work = Delta(v, torch.bfloat16), Backward(d, v, mask)
                pre.rows(lse, delta[0], gate, 0, table)()
                rest = (512, 32, 16)
                keys = work.keys(q, k, x, d_out, table, [n], dk, dv, *rest)
                queries = work.queries(q, k, x, d_out, table, [n], dq, *rest, first=int(mask != WINDOW))
                repeats = 3 if n > 40000 and mask == CAUSAL else 5
                a, b = median_ms(keys, repeats, 1), median_ms(queries, repeats, 1)
                pairs = {CAUSAL: n * (n + 1) // 2, COMPRESSED: sum((p - 31) // 16 + 1 for p in range(31, n)),
                         WINDOW: sum(min(p + 1, 512) for p in range(n))}[mask]
                flop = 2 * pairs * h
                rate = lambda dims, ms: flop * dims / ms / 1e9
                print(f"time d {d}/{v} n {n} {NAMES[mask]}: {a + b:.3f} ms, {rate(3 * d + 2 * v, a + b):.0f} TFLOP/s as "
                      f"5 products; keys {a:.3f} ms {rate(2 * d + 2 * v, a):.0f} of 4, parts {work.parts}; "
                      f"queries {b:.3f} ms {rate(2 * d + v, b):.0f} of 3", flush=True)
            outs = [torch.randn(n, h, v, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
            d_gate = torch.empty_like(gate)
            ms = median_ms(pre.delta(d_out, outs, gate, d_gate, delta), 5, 1)
            print(f"time d {d}/{v} n {n} delta of three: {ms:.3f} ms {4 * outs[0].numel() * 2 / ms / 1e9:.2f} TB/s; "
                  f"rows {median_ms(pre.rows(lse, delta[0], gate, 0, table), 5, 1):.3f} ms", flush=True)


def all_kernels():
    for dtype in (torch.bfloat16, torch.float16):
        for d, v in HEADS:
            if dtype == torch.float16 and (d, v) not in ((128, 128), (192, 128)):
                continue
            for mask in (CAUSAL, COMPRESSED, WINDOW):
                yield KEYS, keys_constants(d, v, mask, dtype)[0]
                yield QUERIES, queries_constants(d, v, mask, dtype)[0]
            yield DELTA, {TYPES[dtype]: 1, "V": v}


if __name__ == "__main__":
    if "compile" in sys.argv:
        for path, defines in all_kernels():
            _, log = compile_cubin(path, defines)
            bad = [x for x in log.splitlines() if "serialized" in x or "spill" in x and " 0 bytes spill stores" not in x]
            print(path.name, defines, bad or "no spills", flush=True)
        sys.exit()
    if "time" not in sys.argv:
        check([(128, 128)] if "first" in sys.argv else HEADS[1:] if "rest" in sys.argv else HEADS)
    if "check" not in sys.argv:
        time_all()
