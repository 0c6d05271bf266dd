"""One implementation in a process of its own: `peers.py` sends it cells to check and to time.

A line of JSON in, a line of JSON out. A peer that crashes or hangs takes nobody with it.
"""

import json
import os
import statistics
import sys
import time

import torch

import peers_formula as formula
from peers_adapters import PEERS, Cannot

HEAD_START = 1_500_000  # cycles, most of a millisecond
FLUSH_BYTES = 256 << 20  # several times the second-level cache
ERROR_LIMIT = 0.02  # of a sampled row's norm, median; bf16 keeps eight bits
GRAD_LIMIT = 0.05


class Case:
    """Inputs of one cell, the same for every peer: made from a seed, or recorded."""

    def __init__(self, cell, grad):
        for name in ("tokens", "heads", "kv_heads", "key_dim", "value_dim"):
            setattr(self, name, cell[name])
        self.batch = cell.get("batch", 1)
        self.device = torch.device("cuda")
        self.generator = torch.Generator(self.device).manual_seed(cell["seed"])
        self.dtype = torch.bfloat16
        self.offsets = torch.tensor([0, self.tokens], dtype=torch.int32, device=self.device)
        self.grad = grad

    def random(self, *shape):
        made = torch.randn(
            shape, generator=self.generator, device=self.device, dtype=torch.float32
        )
        return made.to(self.dtype)

    def training(self, recorded=None):
        """q, k, v [T, heads, dim], gates, and the gradient that arrives from above."""
        t, h, k = self.tokens, self.heads, self.kv_heads
        if recorded:
            from safetensors import safe_open

            with safe_open(recorded, "pt") as file:
                q, k, v = (file.get_slice(name)[:t].to(self.device) for name in "qkv")
            self.q, self.k, self.v = (x.to(self.dtype).contiguous() for x in (q, k, v))
        else:
            self.q = self.random(t, h, self.key_dim)
            self.k = self.random(t, k, self.key_dim)
            self.v = self.random(t, k, self.value_dim)
        self.logits = self.random(t, h, 3)
        self.gate = self.logits.float().sigmoid().to(self.dtype)
        self.leaves = [self.q, self.k, self.v]
        if self.grad:
            self.d_out = self.random(t, h, self.value_dim)
            for x in (*self.leaves, self.gate, self.logits):
                x.requires_grad_(True)
        return self

    def decoding(self):
        """One query a sequence, against caches of `tokens` tokens, the last of them new."""
        b, t, k = self.batch, self.tokens, self.kv_heads
        self.q1 = self.random(b, self.heads, self.key_dim)
        self.logits1 = self.random(b, self.heads, 3)
        self.gate1 = self.logits1.float().sigmoid().to(self.dtype)
        shape = lambda dim: torch.empty(b, t, k, dim, device=self.device, dtype=self.dtype)
        self.k_cache, self.v_cache = shape(self.key_dim), shape(self.value_dim)
        for i in range(b):  # a sequence at a time: the float32 numbers are twice as large
            self.k_cache[i] = self.random(t, k, self.key_dim)
            self.v_cache[i] = self.random(t, k, self.value_dim)
        self.caches = self.k_cache, self.v_cache
        self.lengths = torch.full((b,), t, dtype=torch.int32, device=self.device)
        return self

    def shape(self, spec):
        return formula.Shape(
            self.tokens, self.heads, self.kv_heads, self.key_dim, self.value_dim, spec
        )


class Timer:
    """Medians of CUDA event times, the second-level cache flushed before every run. The device
    sleeps first, so that the host is ahead and its launches are not what is measured."""

    def __init__(self):
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def __call__(self, run, seconds, least=5, most=50):
        for _ in range(2):
            run()
        torch.cuda.synchronize()
        times, started = [], time.monotonic()
        while len(times) < least or (len(times) < most and time.monotonic() - started < seconds):
            self.flush.zero_()
            torch.cuda._sleep(HEAD_START)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        return {
            "ms": statistics.median(times),
            "least_ms": min(times),
            "most_ms": max(times),
            "runs": len(times),
        }


class Memory:
    """The most memory in use above what the inputs take, PyTorch's and Tercet's own."""

    def __init__(self):
        self.native = None
        if "tercet" in sys.modules:
            self.native = sys.modules["tercet"]._native
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        if self.native:
            self.native.reset_memory(0)
        torch.cuda.reset_peak_memory_stats()
        self.base = torch.cuda.memory_allocated()

    def peak(self):
        torch.cuda.synchronize()
        extra = torch.cuda.max_memory_allocated() - self.base
        return extra + (self.native.memory(0)[1] if self.native else 0)


def check_training(peer, case, out, grads):
    """Errors of sampled rows against the float64 formula: output, and the query's gradient."""
    positions = formula.sample(case.tokens, 16, case.device)
    # Parts, so that float64 logits of all heads fit beside everything else.
    errors, d_errors, margins = [], [], []
    shape = case.shape(peer.spec)
    for part in positions.split(4 if case.tokens > 40_000 else 8):
        rows = case.q.detach()[part].double().requires_grad_(grads is not None)
        k, v = case.k.detach(), case.v.detach()
        if peer.spec is None:
            want = formula.dense(shape, rows, k, v, part)
        else:
            want, _, margin = formula.nsa(shape, rows, k, v, case.gate.detach()[part], part)
            margins.append(margin.flatten())
        errors.append(formula.relative(out[part], want.detach()))
        if grads is not None:
            (d_rows,) = torch.autograd.grad(want, rows, case.d_out[part].double())
            d_errors.append(formula.relative(grads[0][part], d_rows))
    result = {"error": torch.cat(errors).median().item(), "worst": torch.cat(errors).max().item()}
    if grads is not None:
        result["d_q_error"] = torch.cat(d_errors).median().item()
        result["d_q_worst"] = torch.cat(d_errors).max().item()
    bad = not result["error"] <= ERROR_LIMIT or not result.get("d_q_error", 0) <= GRAD_LIMIT
    return {**result, "wrong": bad}


def training(peer, cell, timer):
    """Forward, backward, both, and their memory."""
    case = Case(cell, grad=True).training(cell.get("recorded"))
    result = {}
    run = peer.forward(case)
    with torch.no_grad():
        memory = Memory()
        out = run()
        result["forward_bytes"] = memory.peak()
    io = sum(x.numel() * x.element_size() for x in (*case.leaves, out))
    result["io_bytes"] = io
    result["extra"] = max(result["forward_bytes"] - out.numel() * out.element_size(), 0) / io
    grads = None
    memory = Memory()
    try:
        out = run()
        leaves = case.leaves
        grads = torch.autograd.grad(out, leaves, case.d_out, retain_graph=True)
        result["training_bytes"] = memory.peak()
    except Exception as error:
        result["backward_cannot"] = reason(error)
    result.update(check_training(peer, case, out.detach(), grads))
    seconds = cell["seconds"]
    with torch.no_grad():
        result["forward"] = timer(run, seconds)
    if grads is not None:
        del grads
        backward = lambda: torch.autograd.grad(out, leaves, case.d_out, retain_graph=True)
        result["backward"] = timer(backward, seconds)
        del out
        both = lambda: torch.autograd.grad(run(), leaves, case.d_out)
        result["both"] = timer(both, seconds)
    if cell.get("overlap") and hasattr(peer, "choice"):
        q, k, v, gate = (x.detach() for x in (*case.leaves, case.gate))
        result["overlap"] = formula.overlap(case.shape(peer.spec), q, k, v, gate)
    return result


def decoding(peer, cell, timer):
    """One decoding step, in a CUDA graph where the peer can be captured."""
    case = Case(cell, grad=False).decoding()
    stream = torch.cuda.Stream()  # the default stream cannot be captured
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        run = peer.decode(case)
        out = run()
        result = check_decoding(peer, case, out)
        graph = torch.cuda.CUDAGraph()
        try:
            torch.cuda.synchronize()
            with torch.cuda.graph(graph, stream=stream):
                run()
            step, result["graph"] = graph.replay, True
        except Exception as error:
            step, result["graph"] = run, reason(error)
        result["step"] = timer(step, cell["seconds"], least=20, most=200)
    return result


def check_decoding(peer, case, out):
    errors = []
    shape = case.shape(peer.spec)
    position = torch.tensor([case.tokens - 1], device=case.device)
    for i in range(0, case.batch, max(case.batch // 4, 1)):
        q, k, v = case.q1[i : i + 1], case.k_cache[i], case.v_cache[i]
        if peer.spec is None:
            want = formula.dense(shape, q, k, v, position)
        else:
            want, *_ = formula.nsa(shape, q, k, v, case.gate1[i : i + 1], position)
        errors.append(formula.relative(out[i].reshape(want.shape), want))
    errors = torch.cat(errors)
    median = errors.median().item()
    return {"error": median, "worst": errors.max().item(), "wrong": not median <= ERROR_LIMIT}


def reason(error):
    """The first line of an error, short enough for a table."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    kind = "" if isinstance(error, Cannot) else f"{type(error).__name__}: "
    return (kind + lines[0].strip())[:200]


def main():
    # Libraries print; the protocol keeps the real standard output for itself.
    protocol = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    peer = {peer.name: peer for peer in PEERS}[sys.argv[1]]
    answer = {}
    try:
        peer.load()
    except Exception as error:
        answer = {"cannot": reason(error)}
    print(json.dumps({"ready": not answer, **answer}), file=protocol)
    if answer:
        return
    timer = Timer()
    for line in sys.stdin:
        cell = json.loads(line)
        started = time.monotonic()
        try:
            result = {"training": training, "decoding": decoding}[cell["what"]](peer, cell, timer)
        except torch.cuda.OutOfMemoryError as error:
            result = {"cannot": "out of memory: " + reason(error)[:120]}
        except Exception as error:
            result = {"cannot": reason(error)}
            if os.environ.get("PEERS_TRACE"):
                import traceback

                traceback.print_exc()
        torch.cuda.empty_cache()
        result["seconds"] = time.monotonic() - started
        print(json.dumps(result), file=protocol)


if __name__ == "__main__":
    main()
