"""Times of the kernels of `crates/tensor/src/cuda` against a copy of the same bytes.

    python lab/ops_time.py
"""
import torch
from harness import median_ms
from ops import SM, embedding_backward, embedding_forward, kernel, layer_backward, layer_forward, long, pointwise, randn, rms_backward, rms_forward, rope, sort, up, zipf


def main():
    T, C, dtype = 65536, 2048, torch.bfloat16
    a, b = (randn(T, C, dtype=dtype) for _ in range(2))
    ms = median_ms(lambda: b.copy_(a))
    rate = 2 * a.numel() * 2 / ms / 1e6
    print(f"copy of {a.numel() * 2 >> 20} MB: {ms:.3f} ms, {rate:.0f} GB/s")

    def show(name, run, bytes):
        try:
            run()  # compiles
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run()
            ms = median_ms(graph.replay)
            print(f"time {name}: {ms:.4f} ms, floor {bytes / rate / 1e6:.4f} ms, {bytes / rate / 1e6 / ms:.0%} of the copy's rate", flush=True)
        except Exception as e:
            print("time", name, "failed:", e)

    for dtype in (torch.bfloat16, torch.float32):
        size = torch.empty(0, dtype=dtype).element_size()
        for rows, width in [(T, C), (T, 1024), (T, 4096), (T * 16, 128), (T * 16, 64)]:
            x, dy, w, bias = randn(rows, width, dtype=dtype), randn(rows, width, dtype=dtype), randn(width, dtype=dtype), randn(width, dtype=dtype)
            y, dx = torch.empty_like(x), torch.empty_like(x)
            r, m = torch.ones(rows, device="cuda"), torch.ones(rows, 2, device="cuda")
            dw, db, parts = torch.zeros(width, device="cuda"), torch.zeros(width, device="cuda"), torch.empty(2, SM * 12, width, device="cuda")
            n = rows * width * size
            show(f"rms_norm forward {dtype} {rows}x{width}", lambda: rms_forward(x, w, y, r), 2 * n + 4 * rows)
            show(f"rms_norm backward {dtype} {rows}x{width}", lambda: rms_backward(x, dy, w, r, dx, dw, parts[0], False), 3 * n + 4 * rows)
            show(f"rms_norm backward onto {dtype} {rows}x{width}", lambda: rms_backward(x, dy, w, r, dx, dw, parts[0], True), 4 * n + 4 * rows)
            if width == C:
                show(f"layer_norm forward {dtype} {rows}x{width}", lambda: layer_forward(x, w, bias, y, m), 2 * n + 8 * rows)
                show(f"layer_norm backward {dtype} {rows}x{width}", lambda: layer_backward(x, dy, w, m, dx, dw, db, parts, False), 3 * n + 8 * rows)
        n = T * C
        x, u, y, z = (randn(T, C, dtype=dtype).view(-1) for _ in range(4))
        for file, name in [("sigmoid", "sigmoid"), ("gelu", "gelu_tanh"), ("gelu", "gelu_exact")]:
            show(f"{name} forward {dtype}", lambda: pointwise(file, name + "_forward", dtype, n, x, y), 2 * n * size)
            show(f"{name} backward {dtype}", lambda: pointwise(file, name + "_backward", dtype, n, u, x, u), 3 * n * size)
        show(f"swiglu forward {dtype}", lambda: pointwise("swiglu", "swiglu_forward", dtype, n, x, u, y), 3 * n * size)
        show(f"swiglu backward {dtype}", lambda: pointwise("swiglu", "swiglu_backward", dtype, n, z, x, u, y, z), 5 * n * size)
        for heads in (16, 4):
            x = randn(T, heads, 128, dtype=dtype)
            y, positions = torch.empty_like(x), torch.arange(T, dtype=torch.int32, device="cuda")
            inv = torch.rand(64, device="cuda")
            show(f"rope {dtype} heads {heads}", lambda: rope(x, y, positions, inv, 1.0, 1.0), 2 * x.numel() * size)
        x = randn(T, C, dtype=dtype)
        y = torch.empty_like(x)
        for vocab in (32000, 128000):
            for kind in ("uniform", "zipf"):
                ids = zipf(T, vocab) if kind == "zipf" else torch.randint(0, vocab, (T,), device="cuda", dtype=torch.int32)
                used = ids.unique().numel()
                table, total = randn(vocab, C, dtype=dtype), torch.zeros(vocab, C, device="cuda")
                show(f"embedding forward {dtype} vocab {vocab} {kind}", lambda: embedding_forward(table, ids, y), T * C * size + used * C * size)
                show(f"embedding backward {dtype} vocab {vocab} {kind}", lambda: embedding_backward(x, ids, total, False), T * C * size + vocab * C * 4)
                show(f"embedding backward onto {dtype} vocab {vocab} {kind}", lambda: embedding_backward(x, ids, total, True), T * C * size + 2 * used * C * 4)
                show(f"  its sort", lambda: sort(ids, vocab), 0)
        same = torch.zeros(T, dtype=torch.int32, device="cuda")
        show(f"embedding backward onto {dtype}, one id", lambda: embedding_backward(x, same, total, True), T * C * size)
        x = randn(T, 4, 128, dtype=dtype)
        rows = (T - 32) // 16 + 1
        out = torch.empty(rows, 4, 128, dtype=dtype, device="cuda")
        cu_t, cu_n = torch.tensor([0, T], dtype=torch.int32, device="cuda"), torch.tensor([0, rows], dtype=torch.int32, device="cuda")
        v = 16 // size
        k = lambda name: kernel("compress", name, dtype, BLOCK=32, STRIDE=16, HEADS=4, DIM=128, VEC=v)
        width = 512 // v
        bytes = (x.numel() + out.numel()) * size
        show(f"compress mean forward {dtype}", lambda: k("compress_mean_forward")([up(up(rows, 4) * width, 128)], [128], x, out, cu_t, cu_n, 1, long(rows)), bytes)
        show(f"compress mean backward {dtype}", lambda: k("compress_mean_backward")([up(up(T, 16) * width, 128)], [128], out, x, cu_t, cu_n, 1, long(T)), bytes)
        gathered = torch.empty(4, rows, 32 * 128, dtype=dtype, device="cuda")
        show(f"compress gather {dtype}", lambda: k("compress_gather")([up(gathered.numel() // 4 // v, 128), 4], [128], x, gathered, cu_t, cu_n, 1, long(0), long(rows)), (gathered.numel() + x.numel()) * size)
        wide = torch.empty(4, rows, 32 * 128, device="cuda")
        show(f"compress scatter {dtype}", lambda: k("compress_scatter")([up(T * 128 // v, 128), 4], [128], wide, x, cu_t, cu_n, 1, long(0), long(rows), long(0), long(T)), gathered.numel() * 4 + x.numel() * size)
        tokens, experts, top_k = T, 64, 6
        logits = randn(tokens, experts, dtype=dtype)
        p, e, wo = torch.empty(tokens, experts, device="cuda"), torch.empty(tokens, top_k, dtype=torch.int32, device="cuda"), torch.empty(tokens, top_k, dtype=dtype, device="cuda")
        show(f"moe_route forward {dtype}", lambda: kernel("moe_route", "moe_route_forward", dtype, EXPERTS=experts)([up(tokens, 4)], [128], logits, p, e, wo, long(tokens), top_k, 1), tokens * experts * (4 + size))
        rows_of = torch.empty(tokens * top_k, dtype=torch.int32, device="cuda")
        show("  its sort", lambda: sort(e.flatten(), experts, rows_of), 0)
        sort(e.flatten(), experts, rows_of)
        x, big = randn(tokens, 1024, dtype=dtype), randn(tokens * top_k, 1024, dtype=dtype)
        g = dict(WIDTH=1024, VEC=v)
        t = tokens * 1024 // v
        n = tokens * 1024 * size
        show(f"gather_rows forward {dtype}", lambda: kernel("gather_rows", "gather_rows_forward", dtype, **g)([up(t, 256)], [256], x, rows_of, big, long(tokens), top_k), n * (top_k + 1))
        show(f"gather_rows backward {dtype}", lambda: kernel("gather_rows", "gather_rows_backward", dtype, **g)([up(t, 256)], [256], big, rows_of, x, long(tokens), top_k, 0), n * (top_k + 1))
        show(f"scatter_rows forward {dtype}", lambda: kernel("scatter_rows", "scatter_rows_forward", dtype, **g)([up(t, 256)], [256], big, wo, rows_of, x, long(tokens), top_k), n * (top_k + 1))
        dbig = torch.empty_like(big)
        show(f"scatter_rows backward {dtype}", lambda: kernel("scatter_rows", "scatter_rows_backward", dtype, **g)([up(tokens, 8)], [256], x, big, wo, rows_of, dbig, wo, long(tokens), top_k), n * (2 * top_k + 1))
        del big, dbig
        torch.cuda.empty_cache()


if __name__ == "__main__":
    torch.manual_seed(1)
    main()
