"""`attend` on Hopper: right first, then timed against its floor and PyTorch's kernels."""
import math
import sys

import torch

from harness import ROOT, TYPES, Kernel, Map, median_ms, sequences, structure

SOURCE = ROOT / "crates/attention/src/cuda/hopper/attend.cu"
CAUSAL, COMPRESSED, WINDOW = range(3)
LOG2E = 1.4426950408889634


def tile_keys(d, v):
    """Keys a tile (BN): the most that shared memory holds twice beside q and the staged output."""
    pad = lambda x: -(-x // 64) * 64
    for bn in (128, 112, 64, 32):
        if 128 * pad(d) * 2 + 4 * bn * (pad(d) + pad(v)) + 128 * (2 * v + 16) + 80 <= 227 * 1024:
            return bn, 128 * pad(d) * 2 + 4 * bn * (pad(d) + pad(v)) + 128 * (2 * v + 16) + 80


FINITE = torch.zeros(1, dtype=torch.int32, device="cuda")  # no input here holds NaN or infinity


class Attend:
    def __init__(self, d, v, mask, dtype=torch.bfloat16, source=SOURCE):
        (self.bn, shared), self.mask = tile_keys(d, v), mask
        defines = {TYPES[dtype]: 1, "D": d, "V": v, "BN": self.bn, "MASK": mask}
        self.kernel = Kernel(source, "attend", defines, shared)

    def __call__(self, q, k, v, lengths, branch=None, out=None, gate=None, gate_index=0, accumulate=0, lse=None,
                 window=512, block=32, stride=16):
        t, h, d = q.shape
        kv = k.shape[1]
        table, tiles = sequences(lengths, block, stride), sum(lengths) // 128 + len(lengths)
        params = structure([
            ("sequences", table), ("count", len(lengths)), ("spare", 0), ("not_finite", FINITE), ("branch", branch),
            ("out", out), ("gate", gate), ("lse", lse), ("tile_count", tiles), ("heads", h), ("group", h // kv),
            ("window", window), ("block", block), ("stride", stride), ("gate_index", gate_index),
            ("accumulate", accumulate), ("scale_log2", LOG2E / math.sqrt(d)),
        ])
        maps = Map(q, (64, 1, 128)), Map(k, (64, 1, self.bn)), Map(v, (64, 1, self.bn))
        grid = (min(tiles * h, torch.cuda.get_device_properties(0).multi_processor_count),)
        return lambda: (self.kernel(grid, (384,), *maps, params), table)


def reference(q, k, v, lengths, mask, dtype, window=512, block=32, stride=16):
    """The formula in `dtype`; outputs [T, H, V] and log-sum-exps."""
    t, h, d = q.shape
    g = h // k.shape[1]
    outs, lses, token, key = [], [], 0, 0
    for n in lengths:
        m = (0 if n < block else (n - block) // stride + 1) if mask == COMPRESSED else n
        qs = q[token:token + n].to(dtype).transpose(0, 1)
        ks = k[key:key + m].to(dtype).transpose(0, 1).repeat_interleave(g, 0)
        vs = v[key:key + m].to(dtype).transpose(0, 1).repeat_interleave(g, 0)
        p = torch.arange(n, device=q.device)[:, None]
        j = torch.arange(m, device=q.device)[None]
        see = {CAUSAL: j <= p, WINDOW: (j <= p) & (j > p - window), COMPRESSED: j * stride + block <= p + 1}[mask]
        s = (qs @ ks.transpose(1, 2)) * (1 / math.sqrt(d))
        s = s.masked_fill(~see, -math.inf)
        lses.append(torch.logsumexp(s.double(), -1).transpose(0, 1))
        w = torch.softmax(s, -1).nan_to_num(0.0)
        outs.append((w @ vs).transpose(0, 1))
        token, key = token + n, key + m
    return torch.cat(outs), torch.cat(lses)


def check():
    torch.manual_seed(1)
    worst = True
    for dtype in (torch.bfloat16, torch.float16):
        for d, v in [(128, 128), (64, 64), (96, 96), (192, 128), (192, 192), (256, 256), (64, 128)]:
            for mask in (CAUSAL, COMPRESSED, WINDOW):
                if dtype == torch.float16 and (d, v) != (128, 128):
                    continue
                for h, kv, lengths in [(4, 2, [1]), (8, 2, [300, 1, 0, 65, 129, 640]), (3, 3, [1100])]:
                    t = sum(lengths)
                    m = sum(0 if n < 32 else (n - 32) // 16 + 1 for n in lengths) if mask == COMPRESSED else t
                    q = torch.randn(t, h, d, device="cuda").to(dtype) * 2
                    k = torch.randn(max(m, 1), kv, d, device="cuda").to(dtype)
                    x = torch.randn(max(m, 1), kv, v, device="cuda").to(dtype)
                    out = torch.full((t, h, v), math.nan, device="cuda", dtype=dtype)
                    lse = torch.full((t, h), math.nan, device="cuda")
                    window = 200
                    Attend(d, v, mask, dtype)(q, k, x, lengths, branch=out, lse=lse, window=window)()
                    torch.cuda.synchronize()
                    ref, ref_lse = reference(q, k, x, lengths, mask, torch.float64, window)
                    plain, _ = reference(q, k, x, lengths, mask, dtype, window)
                    norm = ref.norm().item() + 1e-30
                    error = (out.double() - ref).norm().item() / norm
                    bound = 2 * (plain.double() - ref).norm().item() / norm + 1e-6
                    a, b = lse.double(), ref_lse
                    seen = b > -math.inf
                    lse_error = (a[seen] - b[seen]).abs().max().item() if seen.any() else 0.0
                    same = bool((a[~seen] == -math.inf).all()) and error <= bound and lse_error < 1e-4
                    worst &= same
                    print(f"{'ok  ' if same else 'FAIL'} {str(dtype)[6:]} d {d}/{v} mask {mask} h {h}/{kv} {lengths}: "
                          f"error {error:.2e} allowed {bound:.2e} lse {lse_error:.1e}", flush=True)
    print("ALL RIGHT" if worst else "SOME WRONG")


def time_all(lengths=(8192, 32768, 65536)):
    h, kv = 64, 4
    for d, v in [(128, 128), (192, 128)]:
        for n in lengths:
            q = torch.randn(n, h, d, device="cuda", dtype=torch.bfloat16)
            out = torch.empty(n, h, v, device="cuda", dtype=torch.bfloat16)
            for mask, name in ((CAUSAL, "causal"), (COMPRESSED, "compressed"), (WINDOW, "window")):
                m = (n - 32) // 16 + 1 if mask == COMPRESSED else n
                k = torch.randn(m, kv, d, device="cuda", dtype=torch.bfloat16)
                x = torch.randn(m, kv, v, device="cuda", dtype=torch.bfloat16)
                lse = torch.empty(n, h, device="cuda")
                kernel = Attend(d, v, mask)
                ms = median_ms(kernel(q, k, x, [n], branch=out, lse=lse), 5 if n > 40000 else 9, 1)
                pairs = {CAUSAL: n * (n + 1) // 2, COMPRESSED: sum((p - 31) // 16 + 1 for p in range(31, n)),
                         WINDOW: sum(min(p + 1, 512) for p in range(n))}[mask]
                flop = 2 * (d + v) * pairs * h
                print(f"time d {d}/{v} n {n} {name}: {ms:.3f} ms {flop / ms / 1e9:.0f} TFLOP/s "
                      f"regs {kernel.kernel.registers} local {kernel.kernel.local}", flush=True)
            if d == v and n <= 32768:
                k = torch.randn(n, kv, d, device="cuda", dtype=torch.bfloat16)
                a, b, c = (y.transpose(0, 1)[None] for y in (q, k.repeat_interleave(16, 1), k.repeat_interleave(16, 1)))
                for backend in (torch.nn.attention.SDPBackend.CUDNN_ATTENTION,):
                    with torch.nn.attention.sdpa_kernel(backend):
                        f = lambda: torch.nn.functional.scaled_dot_product_attention(a, b, c, is_causal=True)
                        try:
                            print(f"time d {d} n {n} {backend}: {median_ms(f, 5, 1):.3f} ms", flush=True)
                        except Exception as e:
                            print(backend, str(e)[:200])


if __name__ == "__main__":
    if "time" not in sys.argv:
        check()
    if "check" not in sys.argv:
        time_all()
