"""`select`, `selected` and the whole forward on Hopper: right first, then timed."""
import math
import sys

import torch

from attend import COMPRESSED, FINITE, LOG2E, WINDOW, Attend
from harness import ROOT, TYPES, Kernel, Map, median_ms, sequences, structure

FOLDER = ROOT / "crates/attention/src/cuda/hopper"
pad = lambda x: -(-x // 64) * 64
power = lambda x: 1 << (x - 1).bit_length()
SMS = torch.cuda.get_device_properties(0).multi_processor_count


class Spec:
    def __init__(self, l=32, d=16, block=64, count=16, initial=1, local=2, window=512):
        self.l, self.d, self.block, self.count, self.initial, self.local, self.window = l, d, block, count, initial, local, window

    def compressed(self, n):
        return 0 if n < self.l else (n - self.l) // self.d + 1


class Select:
    def __init__(self, d, group, spec, dtype=torch.bfloat16, source=FOLDER / "select.cu"):
        self.gp, self.spec = power(group), spec
        self.bn = 128 if pad(d) <= 128 and self.gp > 2 else 64
        self.consumers = 2 if self.gp == 1 else 3
        before = (spec.l // spec.d - 1 + 3) // 4 * 4
        rows = 4 * self.consumers * (16 // self.gp if self.gp < 16 else 1)
        shared = 64 * self.consumers * pad(d) * 2 + 2 * self.bn * pad(d) * 2 + rows * (before + self.bn) * 4
        shared += 4 * self.consumers * 512 + 8 + 48
        self.kernel = Kernel(source, "select", {TYPES[dtype]: 1, "D": d, "GP": self.gp, "BN": self.bn,
                                                 "L": spec.l // spec.d, "R": spec.block // spec.d}, shared)

    def __call__(self, q, k, lengths, lse, indices):
        t, h, d = q.shape
        kv, s = k.shape[1], self.spec
        queries = 64 * self.consumers // self.gp
        table, count = sequences(lengths, s.l, s.d), sum(lengths) // queries + len(lengths)
        params = structure([("sequences", table), ("sequence_count", len(lengths)), ("spare", 0), ("lse", lse),
                            ("indices", indices), ("tile_count", count), ("heads", h), ("group", h // kv), ("l", s.l),
                            ("d", s.d), ("block", s.block), ("count", s.count), ("initial", s.initial),
                            ("local", s.local), ("scale", LOG2E / math.sqrt(d))])
        maps = Map(q, (64, self.gp, 64 * self.consumers // self.gp)), Map(k, (64, 1, self.bn))
        return lambda: (self.kernel((min(SMS, count * kv),), (128 * self.consumers + 128,), *maps, params), table)


class Selected:
    def __init__(self, d, v, group, block, dtype=torch.bfloat16, stages=None, source=FOLDER / "selected.cu"):
        self.gp = power(group)
        stage = 64 * 2 * (pad(d) + pad(v))
        queries = 128 // self.gp
        tag = 4 + 4 * -(-queries // 32)
        lists = queries * 32 * 4
        out = 128 * (2 * v + 16)
        stages = stages or (227 * 1024 - lists - out - 8) // (stage + tag + 32)
        shared = stages * (stage + tag) + out + 8 + stages * 32 + lists
        self.kernel = Kernel(source, "selected", {TYPES[dtype]: 1, "D": d, "V": v, "GP": self.gp, "SB": block, "STAGES": stages}, shared)

    def __call__(self, q, k, v, lengths, indices, branch=None, out=None, gate=None, gate_index=1, accumulate=0, lse=None):
        t, h, d = q.shape
        kv = k.shape[1]
        table, count = sequences(lengths, 1, 1), sum(lengths) // (128 // self.gp) + len(lengths)
        params = structure([("sequences", table), ("sequence_count", len(lengths)), ("spare", 0), ("not_finite", FINITE),
                            ("q", q), ("indices", indices), ("branch", branch), ("out", out), ("gate", gate),
                            ("lse", lse), ("tile_count", count), ("heads", h), ("group", h // kv),
                            ("count", indices.shape[2]), ("gate_index", gate_index), ("accumulate", accumulate),
                            ("scale", LOG2E / math.sqrt(d))])
        maps = Map(k, (64, 1, 64)), Map(v, (64, 1, 64))
        return lambda: (self.kernel((min(SMS, count * kv),), (384,), *maps, params), table)


def scores64(q, k, lengths, spec):
    """Importance of every block in float64: a list of [n, K, J], one a sequence."""
    t, h, d = q.shape
    kv = k.shape[1]
    result, token, key = [], 0, 0
    for n in lengths:
        m, blocks = spec.compressed(n), -(-n // spec.block)
        importance = torch.zeros(n, kv, blocks, dtype=torch.float64, device=q.device)
        if m:
            s = torch.einsum("thd,mhd->htm", q[token:token + n].double(),
                             k[key:key + m].double().repeat_interleave(h // kv, 1)) / math.sqrt(d)
            see = torch.arange(m, device=q.device)[None] * spec.d + spec.l <= torch.arange(n, device=q.device)[:, None] + 1
            p = torch.softmax(s.masked_fill(~see, -math.inf), -1).nan_to_num(0.0).reshape(kv, h // kv, n, m).sum(1)
            r, w = spec.block // spec.d, spec.l // spec.d
            for offset in range(1 - w, r):
                weight = min(r - max(offset, 0), w + min(offset, 0), r, w)
                i = torch.arange(blocks, device=q.device) * r + offset
                ok = (i >= 0) & (i < m)
                importance[:, :, ok] += weight * p[:, :, i[ok]].transpose(0, 1)
        result.append(importance)
        token, key = token + n, key + m
    return result


def check_choice(indices, scores, lengths, spec):
    """(rows with another set of blocks, worst score given up, malformed rows)."""
    token, other, given, bad = 0, 0, 0.0, 0
    for n, score in zip(lengths, scores):
        for t in range(n):
            current = t // spec.block
            for kv in range(score.shape[1]):
                row = indices[token + t, kv].tolist()
                if current < spec.count:
                    bad += row != list(range(current + 1)) + [-1] * (spec.count - current - 1)
                    continue
                forced = list(range(spec.initial)) + list(range(current + 1 - spec.local, current + 1))
                free = spec.count - len(forced)
                x = score[t, kv].tolist()
                rest = sorted(range(spec.initial, current + 1 - spec.local), key=lambda j: (-x[j], j))[:free]
                if row != sorted(forced + rest):
                    other += 1
                    extra, lost = set(row) - set(rest) - set(forced), set(rest) - set(row)
                    if sorted(set(row)) != row or len(row) != spec.count or not set(forced) <= set(row) or row[0] < 0 or row[-1] > current:
                        bad += 1
                    else:
                        worst = max(x[j] for j in lost) - min(x[j] for j in extra)
                        given = max(given, worst / max(x[j] for j in lost))
        token += n
    return other, given, bad


def check():
    torch.manual_seed(2)
    right = True
    cases = [(128, 128, 32, 2, Spec()), (128, 128, 16, 4, Spec()), (64, 64, 8, 2, Spec(count=8)), (192, 128, 16, 1, Spec()),
             (96, 96, 4, 2, Spec(l=16, d=16)), (256, 256, 2, 2, Spec(count=6)), (128, 128, 3, 3, Spec(block=128, count=5)),
             (128, 128, 12, 2, Spec(l=64, d=16)), (128, 128, 64, 1, Spec()), (64, 128, 32, 1, Spec(local=0, initial=0))]
    for d, v, h, kv, spec in cases:
        for lengths in ([1], [1500, 0, 1, 63, 700, 130]):
            t, m = sum(lengths), sum(map(spec.compressed, lengths))
            q = (torch.randn(t, h, d, device="cuda") * 2).bfloat16()
            k, kc = (torch.randn(max(n, 1), kv, d, device="cuda").bfloat16() for n in (t, m))
            x, xc = (torch.randn(max(n, 1), kv, v, device="cuda").bfloat16() for n in (t, m))
            lse = torch.full((t, h), math.nan, device="cuda")
            branch = torch.full((t, h, v), math.nan, device="cuda", dtype=q.dtype)
            Attend(d, v, COMPRESSED)(q, kc, xc, lengths, branch=branch, lse=lse, block=spec.l, stride=spec.d)()
            indices = torch.full((t, kv, spec.count), -7, dtype=torch.int32, device="cuda")
            Select(d, h // kv, spec)(q, kc, lengths, lse, indices)()
            torch.cuda.synchronize()
            other, given, bad = check_choice(indices.cpu(), [s.cpu() for s in scores64(q, kc, lengths, spec)], lengths, spec)
            ok = bad == 0 and given < 1e-4
            # The selected branch on those indices.
            out = torch.full((t, h, v), math.nan, device="cuda", dtype=q.dtype)
            gated = torch.randn(t, h, v, device="cuda").bfloat16()
            before = gated.clone()
            gate = torch.rand(t, h, 3, device="cuda").bfloat16()
            lse_s = torch.full((t, h), math.nan, device="cuda")
            run = Selected(d, v, h // kv, spec.block)(q, k, x, lengths, indices, branch=out, out=gated, gate=gate, accumulate=1, lse=lse_s)
            run()
            torch.cuda.synchronize()
            ref, plain, ref_lse = (torch.empty(t, h, v, dtype=torch.float64, device="cuda"), torch.empty_like(out),
                                   torch.empty(t, h, dtype=torch.float64, device="cuda"))
            token = 0
            for n in lengths:
                see = torch.zeros(n, kv, n, dtype=torch.bool, device="cuda")
                i = indices[token:token + n].long()
                for c in range(spec.count):
                    start = i[:, :, c:c + 1] * spec.block
                    at = torch.arange(n, device="cuda")[None, None]
                    see |= (i[:, :, c:c + 1] >= 0) & (at >= start) & (at < start + spec.block)
                see &= torch.arange(n, device="cuda")[None, None] <= torch.arange(n, device="cuda")[:, None, None]
                see = see.transpose(0, 1).repeat_interleave(h // kv, 0)
                for dtype, target in ((torch.float64, ref), (torch.bfloat16, plain)):
                    qs, ks, vs = (y[token:token + n].to(dtype).transpose(0, 1) for y in (q, k, x))
                    ks, vs = ks.repeat_interleave(h // kv, 0), vs.repeat_interleave(h // kv, 0)
                    s = ((qs @ ks.transpose(1, 2)) / math.sqrt(d)).masked_fill(~see, -math.inf)
                    if dtype == torch.float64:
                        ref_lse[token:token + n] = torch.logsumexp(s, -1).transpose(0, 1)
                    target[token:token + n] = (torch.softmax(s, -1) @ vs).transpose(0, 1)
                token += n
            norm = ref.norm().item()
            error, bound = (out.double() - ref).norm().item() / norm, 2 * (plain.double() - ref).norm().item() / norm + 1e-6
            mix = before.double() + gate[:, :, 1:2].double() * ref
            mix_error = (gated.double() - mix).norm().item() / mix.norm().item()
            lse_error = (lse_s.double() - ref_lse).abs().max().item()
            ok &= error <= bound and lse_error < 1e-4 and mix_error < 4e-3
            right &= ok
            print(f"{'ok  ' if ok else 'FAIL'} d {d}/{v} h {h}/{kv} {vars(spec)} {lengths}: other sets {other} given up {given:.1e} "
                  f"malformed {bad}; selected {error:.2e} allowed {bound:.2e} lse {lse_error:.1e} gated {mix_error:.1e}", flush=True)
    print("ALL RIGHT" if right else "SOME WRONG")


def choices(t, kv, kind, spec):
    """Random ascending choices: forced blocks and, per query or per 8 queries, random others."""
    current = torch.arange(t, device="cuda") // spec.block
    blocks = -(-t // spec.block)
    rows = torch.rand(t if kind == "random" else -(-t // 8), kv, blocks, device="cuda")
    if kind != "random":
        rows = rows.repeat_interleave(8, 0)[:t]
    j = torch.arange(blocks, device="cuda")
    rows.masked_fill_((j < spec.initial)[None, None], 9.0)
    late = (j[None] > current[:, None] - spec.local) & (j[None] <= current[:, None])
    rows.masked_fill_(late[:, None], 8.0).masked_fill_((j[None] > current[:, None])[:, None], -1.0)
    top = rows.topk(min(spec.count, blocks), -1)
    return torch.where(top.values >= 0, top.indices, blocks).sort(-1).values.where(
        top.values.sort(-1, descending=True).values >= 0, -1).int().contiguous()


def time_all(lengths=(8192, 16384, 32768, 65536), dims=((128, 128), (192, 128)), heads=((64, 4),)):
    spec = Spec()
    for d, v in dims:
        for h, kv in heads:
            kernels = Attend(d, v, COMPRESSED), Attend(d, v, WINDOW), Select(d, h // kv, spec), Selected(d, v, h // kv, spec.block)
            for n in lengths:
                m = spec.compressed(n)
                new = lambda *s: torch.randn(*s, device="cuda", dtype=torch.bfloat16)
                q, kc, vc, ks, vs, kw, vw = new(n, h, d), new(m, kv, d), new(m, kv, v), new(n, kv, d), new(n, kv, v), new(n, kv, d), new(n, kv, v)
                gate = torch.rand(n, h, 3, device="cuda").bfloat16()
                out, lse = torch.empty(n, h, v, device="cuda", dtype=torch.bfloat16), torch.empty(n, h, device="cuda")
                indices = torch.empty(n, kv, spec.count, dtype=torch.int32, device="cuda")
                cmp, win, sel, slc = kernels
                parts = {
                    "cmp": cmp(q, kc, vc, [n], out=out, gate=gate, gate_index=0, lse=lse),
                    "select": sel(q, kc, [n], lse, indices),
                    "slc": slc(q, ks, vs, [n], indices, out=out, gate=gate, gate_index=1, accumulate=1),
                    "win": win(q, kw, vw, [n], out=out, gate=gate, gate_index=2, accumulate=1),
                }
                text = []
                for name, run in parts.items():
                    text.append(f"{name} {median_ms(run, 5, 1):.3f}")
                whole = median_ms(lambda: [run() for run in parts.values()], 5, 1)
                print(f"time d {d}/{v} h {h}/{kv} n {n}: {' '.join(text)} whole {whole:.3f} ms", flush=True)
                if n >= 32768:
                    near = choices(n, kv, "near", spec)
                    print(f"     slc where 8 neighbours choose alike {median_ms(slc(q, ks, vs, [n], near, out=out, gate=gate, accumulate=1), 5, 1):.3f} ms", flush=True)
            for k, name in zip(kernels, ("cmp", "win", "select", "selected")):
                print(f"     {name}: registers {k.kernel.registers} local {k.kernel.local} shared {k.kernel.shared}")


if __name__ == "__main__":
    if "time" not in sys.argv:
        check()
    if "check" not in sys.argv:
        if "quick" in sys.argv:
            time_all((8192, 65536), ((128, 128),))
        else:
            time_all()
        time_all((65536,), ((128, 128),), ((64, 16), (64, 64)))
