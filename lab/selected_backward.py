"""Gradients of the selected branch on Hopper: right first, then timed.

`python selected_backward.py [check|time]`
"""
import math
import sys

import torch

from harness import ROOT, TYPES, Kernel, Map, median_ms, structure

FOLDER = ROOT / "crates/attention/src/cuda/hopper"
SHARED_LIMIT = 227 * 1024
PARTS_LIMIT = 2304 << 20
SMS = torch.cuda.get_device_properties(0).multi_processor_count if torch.cuda.is_available() else 132
pad = lambda x: -(-x // 64) * 64
power = lambda x: 1 << (x - 1).bit_length()


_zero = None


def all_finite():
    """What the kernels are told of inputs without NaN and ∞."""
    global _zero
    if _zero is None:
        _zero = torch.zeros(1, dtype=torch.int32, device="cuda")
    return _zero


def sequence_table(lengths):
    rows, token = [], 0
    for n in lengths:
        rows.append((token, n, 0, token, n, 0, 0, 0))
        token += n
    return torch.tensor(rows, dtype=torch.int32, device="cuda")


class Inverse:
    """The queries of every block, and the work items of the keys' kernel."""

    def __init__(self, dtype=torch.bfloat16):
        entry = lambda name, shared=0: Kernel(FOLDER / "inverse.cu", name, {TYPES[dtype]: 1}, shared)
        self.count, self.pieces, self.fill_global = (entry("inverse_" + n) for n in ("count", "pieces", "fill"))
        self.blocks, self.fill_shared = entry("inverse_blocks"), None

    def __call__(self, indices, lengths, block, parts_bytes=None):
        """parts_bytes: of one KV head's parts of dQ, if the keys' kernel is to make dQ too."""
        t, kv, listed = indices.shape
        self.table = sequence_table(lengths)
        j = t // block + len(lengths)
        bins, pairs = kv * j, t * kv * listed
        piece = max(64, -(-t // 256))
        count = -(-t // piece)
        self.heads_a_launch = kv if parts_bytes is None else max(1, min(kv, PARTS_LIMIT // max(1, parts_bytes)))
        self.launches = [(a, min(a + self.heads_a_launch, kv)) for a in range(0, kv, self.heads_a_launch)]
        self.chunk = max(256, power(max(1, t * self.heads_a_launch * listed // 512)))
        self.blocks_a_head = j
        self.capacity = bins + pairs // self.chunk
        self.slots = 2 * (pairs // self.chunk)
        make = lambda n, kind: torch.full((max(n, 1),), -7, dtype=kind, device="cuda")
        pieces, totals = make(count * bins, torch.int32), make(bins, torch.int32)
        self.starts, self.queries = make(bins + 1, torch.int64), make(pairs, torch.int32)
        self.items = make(self.capacity * 12, torch.int32)
        self.heads, self.places = make(kv + 1, torch.int32), None if parts_bytes is None else make(pairs, torch.int32)
        sequences = structure([("at", self.table), ("count", len(lengths)), ("block", block)])
        in_shared = j * 4 <= 48 * 1024
        kernel = Kernel.__new__(Kernel)
        kernel.__dict__.update(self.fill_global.__dict__)
        kernel.shared = j * 4 if in_shared else 0

        def run():
            self.count((count, kv), (256,), sequences, indices, t, kv, listed, j, piece, pieces)
            self.pieces((-(-bins // 128),), (128,), pieces, totals, count, bins)
            self.blocks((1,), (1024,), sequences, totals, self.starts, self.items, self.heads, self.capacity, self.chunk, kv, j)
            kernel((count, kv), (32,), sequences, indices, t, kv, listed, j, piece, pieces, self.starts,
                   self.queries, self.places, int(in_shared))

        self.keep = pieces, totals
        return run


class Keys:
    def __init__(self, d, v, group, block, dtype=torch.bfloat16, stages=None, with_queries=False, more={},
                 source=FOLDER / "selected_backward_keys.cu"):
        stage = 64 * (pad(d) + pad(v)) * 2 + 64 * 16 + 16
        held = 64 * (pad(d) + pad(v)) * 2 + (2 * 64 * 64 * 2 + 16 if with_queries else 0) + 16
        stages = stages or min(6, (SHARED_LIMIT - held) // stage)
        defines = {TYPES[dtype]: 1, "D": d, "V": v, "G": group, "SB": block, "STAGES": stages}
        if with_queries:
            assert d <= 128 and v <= 128
            defines["WITH_QUERIES"] = 1
        defines |= more
        self.kernel = Kernel(source, "selected_backward_keys", defines, held + stages * stage)
        self.sum = Kernel(source, "selected_backward_keys_sum", defines)
        self.queries_sum = Kernel(source, "selected_backward_queries_sum", defines) if with_queries else None
        self.parts, self.group = block // 64, group

    def __call__(self, inverse, q, k, v, d_out, lse, delta, dk, dv, gate=None, scale=None, dq=None, total=None, first=1,
                 last=1, listed=0):
        (t, h, d), (kv, e) = q.shape, v.shape[1:]
        sums = torch.full((max(1, inverse.slots * self.parts * 64 * (d + e)),), math.nan, device="cuda")
        parts = None
        if dq is not None:
            parts = torch.full((inverse.heads_a_launch * t * listed * self.group * d,), math.nan, dtype=q.dtype, device="cuda")
        maps = Map(q, (64, self.group, 1)), Map(d_out, (64, self.group, 1)), Map(k, (64, 1, 64)), Map(v, (64, 1, 64))
        launches = []
        for a, b in inverse.launches if dq is not None else [(0, kv)]:
            params = structure([("items", inverse.items), ("item_heads", inverse.heads), ("starts", inverse.starts),
                                ("queries", inverse.queries), ("places", inverse.places), ("q", q), ("d_out", d_out),
                                ("gate", gate), ("lse", lse), ("delta", delta), ("dk", dk), ("dv", dv), ("sums", sums),
                                ("parts", parts), ("dq", dq), ("dq_sum", total), ("not_finite", all_finite()),
                                ("tokens", t), ("heads", h),
                                ("kv_heads", kv), ("gate_index", 1), ("first_head", a), ("end_head", b),
                                ("blocks", inverse.blocks_a_head), ("listed", listed), ("first", first), ("last", last),
                                ("scale", scale or 1 / math.sqrt(d))])
            items = (b - a) * inverse.blocks_a_head + inverse.slots // 2
            launches.append((params, items * self.parts, t * (b - a)))

        def run(adding=True):
            for params, blocks, rows in launches:
                self.kernel((blocks,), (384,), *maps, params)
                self.sum((blocks,), (256,), params)
                if dq is not None and adding:
                    self.queries_sum((rows,), (-(-self.group * d // 256) * 32,), params)
            return sums, parts

        return run


class Queries:
    def __init__(self, d, v, group, block, listed, dtype=torch.bfloat16, stages=None, more={},
                 source=FOLDER / "selected_backward_queries.cu"):
        self.gp = power(group)
        warps = 8 if d + v <= 384 else 4
        rows = 16 * warps
        self.queries = rows // self.gp
        entries = self.queries * listed
        lists = entries * (12 + 4 * -(-self.queries // 32))
        plans = 2 if lists <= 16384 else 1
        lists = plans * (lists + 48) + 64
        held = 32 if d + v <= 256 else rows * (pad(d) + pad(v)) * 2
        stage = 32 * (pad(d) + pad(v)) * 2 + 16
        stages = stages or min(24, (SHARED_LIMIT - held - lists) // stage)
        assert stages >= 2, "too many lists for shared memory"
        defines = {TYPES[dtype]: 1, "D": d, "V": v, "GP": self.gp, "SB": block, "S": listed, "STAGES": stages, **more}
        self.kernel = Kernel(source, "selected_backward_queries", defines, stages * stage + held + lists)
        self.threads = 128 + 32 * warps

    def __call__(self, q, k, v, d_out, lse, delta, indices, lengths, dq, total=None, first=1, last=1, gate=None, scale=None):
        (t, h, d), kv = q.shape, k.shape[1]
        table, tiles = sequence_table(lengths), t // self.queries + len(lengths)
        params = structure([("sequences", table), ("sequence_count", len(lengths)), ("spare", 0), ("q", q), ("d_out", d_out), ("gate", gate), ("lse", lse), ("delta", delta),
                            ("indices", indices), ("dq", dq), ("sum", total), ("not_finite", all_finite()), ("tile_count", tiles), ("heads", h), ("kv_heads", kv),
                            ("group", h // kv), ("gate_index", 1), ("first", first), ("last", last),
                            ("scale", scale or 1 / math.sqrt(d))])
        maps = Map(k, (64, 1, 32)), Map(v, (64, 1, 32))
        return lambda: (self.kernel((min(tiles * kv, SMS),), (self.threads,), *maps, params), table)


def choose(lengths, kv, block, count, neighbours=1, noise=0.0, seed=1):
    """Indices as `select` makes them: the first block and two local ones forced, the rest by chance;
    `neighbours` queries in a row have the same scores but for `noise`."""
    generator = torch.Generator("cuda").manual_seed(seed)
    out = []
    for n in lengths:
        j = -(-n // block)
        for p in range(0, n, 4096):
            m = min(4096, n - p)
            groups = -(-m // neighbours)
            scores = torch.rand(groups, kv, j, device="cuda", generator=generator).repeat_interleave(neighbours, 0)[:m]
            if noise:
                scores = scores + noise * torch.rand(m, kv, j, device="cuda", generator=generator)
            current = (torch.arange(p, p + m, device="cuda") // block)[:, None, None]
            block_id = torch.arange(j, device="cuda")
            scores[((block_id == 0) | (block_id == current) | (block_id == current - 1)).expand_as(scores)] = 9.0
            scores[(block_id > current).expand_as(scores)] = -9.0
            best, chosen = torch.topk(scores, min(count, j), -1)
            chosen = torch.where(best > -1, chosen, 1 << 30).sort(-1).values
            chosen = torch.where(chosen == 1 << 30, -1, chosen).int()
            if j < count:
                chosen = torch.nn.functional.pad(chosen, (0, count - j), value=-1)
            out.append(chosen)
    return torch.cat(out) if out else torch.zeros(0, kv, count, dtype=torch.int32, device="cuda")


def visible(indices, start, n, block):
    """[n, K, n]: a list is the set of those of its entries that are blocks of its query."""
    rows = indices[start:start + n].long()
    position = torch.arange(n, device="cuda")
    counts = (rows >= 0) & (rows <= (position // block)[:, None, None])
    j = -(-n // block)
    seen = torch.zeros(n, rows.shape[1], j + 1, dtype=torch.bool, device="cuda")
    seen.scatter_(2, torch.where(counts, rows, j), True)
    seen = seen[..., :j].repeat_interleave(block, -1)[..., :n]
    return seen & (position[None, None] <= position[:, None, None])


def formula(q, k, v, indices, gate, d_out, lengths, block, dtype):
    """Gradients by autograd of the plain formula in `dtype`; also lse and dOut·O, of float64 use."""
    (t, h, d), kv = q.shape, k.shape[1]
    g = h // kv
    parts, token = [], 0
    for n in lengths:
        if n == 0:
            continue
        at = slice(token, token + n)
        qs, ks, vs = (x[at].to(dtype).requires_grad_() for x in (q, k, v))
        s = torch.einsum("tkgd,jkd->tkgj", qs.view(n, kv, g, d), ks) * (1 / math.sqrt(d))
        s = s.masked_fill(~visible(indices, token, n, block)[:, :, None], -math.inf)
        lse = torch.logsumexp(s.detach().double(), -1).reshape(n, h)
        p = torch.softmax(s, -1).nan_to_num(0.0)
        out = torch.einsum("tkgj,jkv->tkgv", p, vs).reshape(n, h, -1)
        up = d_out[at].to(dtype)
        upstream = up if gate is None else up * gate[at, :, 1:2].to(dtype)
        grads = torch.autograd.grad(out, (qs, ks, vs), upstream)
        parts.append((*(x.nan_to_num(0.0) for x in grads), lse, (up.double() * out.detach().double()).sum(-1)))
        token += n
    return [torch.cat(x) for x in zip(*parts)]


def rough(a):
    return torch.full_like(a, math.nan)


class Setup:
    """Inputs of one case and the kernels' runs."""

    def __init__(self, d, v, h, kv, lengths, block, count, dtype=torch.bfloat16, with_gate=True, hostile=False):
        t = sum(lengths)
        normal = lambda *shape: torch.randn(*shape, device="cuda").to(dtype)
        self.q, self.k, self.v, self.d_out = normal(t, h, d) * 2, normal(t, kv, d), normal(t, kv, v), normal(t, h, v)
        self.gate = torch.rand(t, h, 3, device="cuda").to(dtype) if with_gate else None
        if with_gate:
            self.gate[::7, ::3] = 0.0
        self.indices = choose(lengths, kv, block, count)
        if hostile:
            bad = torch.tensor([-(1 << 31), (1 << 31) - 1, -5, 1 << 20, 0, 1], dtype=torch.int32, device="cuda")
            spots = torch.rand(self.indices.shape, device="cuda") < 0.3
            junk = bad[torch.randint(0, len(bad), self.indices.shape, device="cuda")]
            self.indices = torch.where(spots, junk, self.indices)
            self.indices[::5] = -1
            again = torch.rand(t, kv, count, device="cuda") < 0.2
            again[..., 0] = False
            self.indices = torch.where(again, self.indices.roll(1, -1), self.indices)
            self.indices[2::5] = self.indices[2::5].flip(-1)
        self.args = (self.q, self.k, self.v, self.indices, self.gate, self.d_out, lengths, block)
        self.exact = formula(*self.args, torch.float64)
        self.plain = formula(*self.args, dtype)
        self.lse = self.exact[3].float()
        self.delta = self.exact[4].float()
        if with_gate:
            self.delta = self.delta * self.gate[..., 1].float()
        self.lengths, self.block, self.dtype = lengths, block, dtype
        self.grads = rough(self.q), rough(self.k), rough(self.v)
        self.inverse = Inverse(dtype)
        with_queries = d <= 128 and v <= 128 and block == 64
        self.invert = self.inverse(self.indices, lengths, block, t * count * (h // kv) * d * 2 if with_queries else None)
        self.together = None
        if with_queries:
            self.both = Keys(d, v, h // kv, block, dtype, with_queries=True)
            self.grads_together = rough(self.q), rough(self.k), rough(self.v)
            self.together = lambda **more: self.both(
                self.inverse, self.q, self.k, self.v, self.d_out, self.lse, self.delta, *self.grads_together[1:],
                gate=self.gate, listed=count, **{"dq": self.grads_together[0], **more})
            self.run_together = self.together()
        self.keys = Keys(d, v, h // kv, block, dtype)
        self.run_keys = self.keys(self.inverse, self.q, self.k, self.v, self.d_out, self.lse, self.delta, *self.grads[1:],
                                  gate=self.gate)
        self.queries = Queries(d, v, h // kv, block, count, dtype)
        self.inputs = self.q, self.k, self.v, self.d_out, self.lse, self.delta, self.indices, lengths
        self.run_queries = self.queries(*self.inputs, self.grads[0], gate=self.gate)

    def run(self):
        for g in self.grads:
            g.fill_(math.nan)
        self.invert()
        self.run_keys()
        self.run_queries()
        if self.together:
            for g in self.grads_together:
                g.fill_(math.nan)
            self.run_together()
        torch.cuda.synchronize()

    def lists_right(self):
        """The inverse against a sort."""
        token, worst = 0, True
        starts = self.inverse.starts.tolist()
        kv, j = self.indices.shape[1], (len(starts) - 1) // self.indices.shape[1]
        queries = self.inverse.queries.tolist()
        expected = {}
        for b, n in enumerate(self.lengths):
            if n:
                see = visible(self.indices, token, n, self.block)[..., ::self.block]
                for t, k, block in see.nonzero().tolist():
                    expected.setdefault((k, token // self.block + b + block), []).append(token + t)
            token += n
        for k in range(kv):
            for i in range(j):
                a, z = starts[k * j + i], starts[k * j + i + 1]
                worst &= queries[a:z] == expected.get((k, i), [])
        return worst


def compare(name, got, exact, plain):
    # Gradients may be zero but for rounding (one key seen): then what counts is the size of their terms.
    norm = max(exact.norm().item(), exact.numel() ** 0.5)
    error = (got.double() - exact).norm().item() / norm
    bound = 2 * (plain.double() - exact).norm().item() / norm + 1e-6
    return error <= bound, f"{name} {error:.1e}/{bound:.1e}"


def cases():
    many = [0, 1, 63, 65, 0, 300, 1000]
    for h, kv, count in [(16, 1, 16), (32, 2, 5), (8, 2, 16), (2, 2, 16), (4, 2, 1), (6, 1, 32), (16, 2, 16), (64, 2, 7), (64, 1, 16)]:
        yield 128, 128, h, kv, many, 64, count, {}
    for d, v in [(64, 64), (96, 96), (192, 128), (192, 192), (256, 256), (64, 128)]:
        for h in (16, 4):
            yield d, v, h, 1, many, 64, 8, {}
    for h in (16, 4):
        yield 128, 128, h, 1, many, 128, 4, {}
        yield 128, 128, h, 1, [700], 64, 16, dict(dtype=torch.float16)
        yield 128, 128, h, 1, [1], 64, 16, dict(with_gate=False)
        yield 128, 128, h, 1, many, 64, 16, dict(hostile=True)
    yield 128, 128, 16, 1, [3000], 64, 16, {}
    yield 256, 256, 16, 1, [1500], 192, 2, {}


def check():
    right = True
    for d, v, h, kv, lengths, block, count, more in cases():
        torch.manual_seed(1)
        name = f"d {d}/{v} h {h}/{kv} {lengths} block {block} S {count} {more}"
        try:
            s = Setup(d, v, h, kv, lengths, block, count, **more)
            s.run()
            results = [compare(*x) for x in zip(("dq", "dk", "dv"), s.grads, s.exact, s.plain)]
            if s.together:
                results += [compare(*x) for x in zip(("together dq", "dk", "dv"), s.grads_together, s.exact, s.plain)]
            lists = s.lists_right()
            ok = all(r[0] for r in results) and lists
            print("ok  " if ok else "FAIL", name, *(r[1] for r in results), "" if lists else "LISTS WRONG", flush=True)
            right &= ok
        except Exception as e:
            right = False
            print("FAIL", name, type(e).__name__, str(e)[:600], flush=True)
            if "CUDA error" in str(e) and "LAUNCH" in str(e).upper():
                break
    torch.manual_seed(1)
    s = Setup(128, 128, 32, 2, [1500, 300], 64, 16)
    s.run()
    kept = [g.clone() for g in s.grads + s.grads_together]
    same = True
    for _ in range(50):
        s.run()
        same &= all(torch.equal(a.view(torch.int16), b.view(torch.int16)) for a, b in zip(kept, s.grads + s.grads_together))
    print("ok  " if same else "FAIL", "50 repeats, the same bits; longest list in items:", s.inverse.chunk)
    # dQ on top of what is there, in 16 bits and in f32.
    base = torch.randn_like(s.grads[0])
    want = base.double() + s.exact[0]
    distance = lambda x: ((x.double() - want).norm() / want.norm()).item()
    fine = True
    for name, start in (("apart", lambda dq, **m: s.queries(*s.inputs, dq, gate=s.gate, **m)()),
                        ("together", lambda dq, **m: s.together(dq=dq, **m)())):
        dq, total, final = base.clone(), base.float(), rough(base)
        start(dq, first=0)
        start(dq.clone(), total=total, first=0, last=0)
        start(final, total=base.float(), first=0, last=1)
        good = distance(dq) < 5e-3 and distance(total) < 4e-3 and torch.equal(final, total.to(final.dtype))
        print("ok  " if good else "FAIL", f"dQ added, {name}: {distance(dq):.1e} in 16 bits, {distance(total):.1e} in f32")
        fine &= good
    print("ALL RIGHT" if right and same and fine else "SOME WRONG")


def time_one(n, d, v, h, kv, label, neighbours=1, noise=0.0, block=64, count=16, repeats=5, stages=None, which="kq"):
    torch.manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
    q, k, x, d_out = normal(n, h, d), normal(n, kv, d), normal(n, kv, v), normal(n, h, v)
    gate = torch.rand(n, h, 3, device="cuda").bfloat16()
    lse = torch.full((n, h), 7.5, device="cuda")
    delta = torch.randn(n, h, device="cuda")
    indices = choose([n], kv, block, count, neighbours, noise)
    inverse = Inverse()
    with_queries = d <= 128 and v <= 128 and block == 64
    invert = inverse(indices, [n], block, n * count * (h // kv) * d * 2 if with_queries else None)
    ms = {"inverse": median_ms(invert, repeats, 1)}
    keys, queries = Keys(d, v, h // kv, block), Queries(d, v, h // kv, block, count)
    dk, dv, dq = torch.empty_like(k), torch.empty_like(x), torch.empty_like(q)
    inputs = inverse, q, k, x, d_out, lse, delta, dk, dv
    ms["keys"] = median_ms(keys(*inputs, gate=gate), repeats, 1)
    ms["queries"] = median_ms(queries(q, k, x, d_out, lse, delta, indices, [n], dq, gate=gate), repeats, 1)
    if with_queries:
        both = Keys(d, v, h // kv, block, with_queries=True)
        run = both(*inputs, gate=gate, dq=dq, listed=count)
        ms["together"] = median_ms(run, repeats, 1)
        ms["without adding"] = median_ms(lambda: run(False), repeats, 1)
        keys = both
    pairs = int((indices >= 0).sum())
    products = 2 * pairs * block * (h // kv)
    flop = {"keys": products * 2 * (d + v), "queries": products * (2 * d + v),
            "together": products * (3 * d + 2 * v)}
    lists = inverse.starts.diff()
    print(f"time {label} d {d}/{v} h {h}/{kv} n {n}: "
          + ", ".join(f"{a} {m:.3f} ms" + (f" {flop[a] / m / 1e9:.0f} TFLOP/s" if a in flop else "") for a, m in ms.items())
          + f"; chunk {inverse.chunk}, longest list {int(lists.max())}, second {int(lists.sort().values[-kv - 1])}", flush=True)
    return keys, queries


def time_all():
    for n in (8192, 32768, 65536):
        for label, neighbours, noise in (("random", 1, 0.0), ("shared", 16, 0.05)):
            keys, queries = time_one(n, 128, 128, 64, 4, label, neighbours, noise)
    for kernel in (keys.kernel, queries.kernel):
        print("registers", kernel.registers, "local", kernel.local, "shared", kernel.shared)
    time_one(32768, 192, 128, 64, 4, "random")
    time_one(32768, 128, 128, 64, 16, "random")
    time_one(8192, 128, 128, 64, 64, "random")
    time_one(32768, 64, 64, 64, 4, "random")


if __name__ == "__main__":
    if "time" not in sys.argv:
        check()
    if "check" not in sys.argv:
        time_all()
