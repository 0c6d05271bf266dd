#!/usr/bin/env python3
"""Tercet beside every other implementation on this machine: one run, one card, one table.

    python bench/peers.py --path DIR_WITH_PEERS --output out/peers

Each implementation runs in a process of its own and is checked against a float64 formula on sampled
queries before it is timed. Times are medians of CUDA event times with the second-level cache flushed
before every run. What cannot run says why in the table. Written: peers.md, peers.json, *.svg.

Peers are found where Python finds them, and in each --path: a folder on which `flash_nsa`, `fla`,
`native_sparse_attention`, `fsa`, `flash_attn`, `flash_attn_3/_C*.so` lie. None of their code is here.

--recorded takes a safetensors file with a trained model's `q` [T, H, D], `k` [T, K, D] and `v` [T, K, V] of one layer,
roped; for them and for random data it says how many blocks neighbouring queries have in common.
"""

import argparse
import json
import os
import pathlib
import select
import signal
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
TABLES = ("lengths", "decode", "decode1", "groups", "dims", "recorded")


def length(text):
    """8192, 8k or 1M."""
    scale = {"k": 1 << 10, "m": 1 << 20}.get(text[-1:].lower(), 1)
    return int(text[:-1] if scale > 1 else text) * scale


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--path", action="append", default=[], help="a folder with peers")
    parser.add_argument("--output", default="out/peers", help="folder for the results")
    parser.add_argument("--lengths", default="4k,8k,16k,32k,64k,128k")
    parser.add_argument("--decode-lengths", default="8k,16k,32k,64k,128k")
    parser.add_argument("--groups", default="16,8,4,2,1", help="query heads per KV head")
    parser.add_argument("--groups-length", default="32k")
    parser.add_argument("--heads", type=int, default=64)
    parser.add_argument("--cache-gb", type=float, default=8, help="of a full decoding batch")
    parser.add_argument("--recorded", action="append", default=[], help="safetensors with q, k, v")
    parser.add_argument("--only", default="", help=f"of {', '.join(TABLES)}, and names of peers")
    parser.add_argument("--quick", action="store_true", help="a minute or two: 4k and 8k, G 16 and 4")
    parser.add_argument("--time-budget", type=float, default=0, help="seconds; 0 is no limit")
    parser.add_argument("--cell-limit", type=float, default=120, help="seconds for one cell")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    if options.quick:
        options.lengths, options.decode_lengths = "4k,8k", "8k"
        options.groups, options.groups_length = "16,4", "8k"
        options.cache_gb = min(options.cache_gb, 1)
    return options


class Worker:
    """A peer's process; started again when it died."""

    def __init__(self, name, environment):
        self.name, self.environment, self.process = name, environment, None
        self.cannot = None
        self.start()

    def start(self):
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "peers_worker.py"), self.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.environment["log"],
            env=self.environment["variables"],
            start_new_session=True,
        )
        self.ready = False

    def wait_ready(self, limit):
        if not self.ready and self.cannot is None:
            answer = self.read(limit)
            self.ready = answer.get("ready", False)
            if not self.ready:
                self.cannot = answer.get("cannot", "did not start")

    def read(self, limit):
        """One line of JSON, or why there is none."""
        deadline, buffer = time.monotonic() + limit, b""
        pipe = self.process.stdout
        while not buffer.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([pipe], [], [], left)[0]:
                self.stop()
                return {"cannot": f"no answer within {limit:.0f} s"}
            part = os.read(pipe.fileno(), 1 << 16)
            if not part:
                code = self.process.wait()
                how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                return {"cannot": f"its process ended ({how})"}
            buffer += part
        return json.loads(buffer)

    def send(self, cell):
        if self.process.poll() is not None:
            self.start()
            self.wait_ready(60)
        try:
            self.process.stdin.write(json.dumps(cell).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # reading says why

    def ask(self, cell, limit):
        if self.cannot:
            return {"cannot": self.cannot}
        self.send(cell)
        if self.cannot:
            return {"cannot": self.cannot}
        return self.read(limit)

    def stop(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def cells(options):
    """Everything to measure, in the order of importance."""
    full = dict(heads=options.heads, kv_heads=max(options.heads // 16, 1), key_dim=128, value_dim=128)
    lengths = [length(x) for x in options.lengths.split(",")]
    made = []

    def add(table, what, tokens, **changes):
        made.append({**full, "table": table, "what": what, "tokens": tokens, **changes})

    for tokens in lengths:
        add("lengths", "training", tokens, overlap=tokens == lengths[-1])
    for tokens in (length(x) for x in options.decode_lengths.split(",")):
        per_sequence = tokens * full["kv_heads"] * (full["key_dim"] + full["value_dim"]) * 2
        batch = max(int(options.cache_gb * (1 << 30) // per_sequence), 1)
        add("decode", "decoding", tokens, batch=batch)
        add("decode1", "decoding", tokens, batch=1)
    for group in (int(x) for x in options.groups.split(",")):
        tokens = length(options.groups_length)
        add("groups", "training", tokens, kv_heads=max(options.heads // group, 1))
    for tokens in lengths:
        add("dims", "training", tokens, key_dim=192)
    for file in options.recorded:
        q, k, v = recorded_shapes(file)
        sizes = dict(heads=q[1], kv_heads=k[1], key_dim=q[2], value_dim=v[2])
        for tokens in [x for x in lengths if x <= q[0]] or [q[0]]:
            add("recorded", "training", tokens, recorded=file, overlap=True, **sizes)
    order = {table: i for i, table in enumerate(TABLES)}
    return sorted(made, key=lambda cell: order[cell["table"]])


def recorded_shapes(file):
    from safetensors import safe_open

    with safe_open(file, "pt") as tensors:
        return [tensors.get_slice(name).get_shape() for name in "qkv"]


def environment(options, output):
    variables = dict(os.environ)
    paths = [str(pathlib.Path(path).resolve()) for path in options.path]
    known = variables.get("PYTHONPATH", "")
    variables["PYTHONPATH"] = os.pathsep.join([*paths, *([known] if known else [])])
    return {"variables": variables, "log": open(output / "peers.log", "ab")}


def machine():
    import torch

    properties = torch.cuda.get_device_properties(0)
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda}
    try:
        import triton

        versions["triton"] = triton.__version__
    except ImportError:
        pass
    return {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_gb": round(properties.total_memory / 1e9),
        "versions": versions,
    }


def main():
    options = arguments()
    started = time.monotonic()
    output = pathlib.Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    sys.path[:0] = [str(HERE), *options.path]
    from peers_adapters import PEERS
    import peers_report

    wanted = {word for word in options.only.split(",") if word}
    names = [peer.name for peer in PEERS]
    unknown = wanted - set(names) - set(TABLES)
    if unknown:
        raise SystemExit(f"--only: {', '.join(sorted(unknown))} is none of {', '.join((*TABLES, *names))}")
    tables = wanted & set(TABLES) or set(TABLES)
    names = [name for name in names if name in wanted] or names
    place = environment(options, output)
    workers = {name: Worker(name, place) for name in names}
    does = {peer.name: peer.does for peer in PEERS}
    results = {
        "command": " ".join(sys.argv),
        "when": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "seed": options.seed,
        "machine": machine(),
        "dtype": "bfloat16",
        "kinds": {peer.name: peer.kind for peer in PEERS if peer.name in names},
        "rows": [],
    }
    left = lambda: options.time_budget - (time.monotonic() - started) if options.time_budget else 1e9
    todo = [cell for cell in cells(options) if cell["table"] in tables]
    common = {"seed": options.seed, "seconds": 0.25 if options.quick or options.time_budget else 0.5}
    try:
        for worker in workers.values():
            worker.wait_ready(min(90, max(left(), 1)))
        warm(workers, does, todo, common, min(options.cell_limit, left() / 3))
        for cell in todo:
            for name, worker in workers.items():
                if cell["what"] not in does[name]:
                    continue
                if left() < 3:
                    answer = {"cannot": "no time left"}
                else:
                    answer = worker.ask({**cell, **common}, min(options.cell_limit, left()))
                results["rows"].append({"peer": name, **cell, **answer})
                print(peers_report.line(results["rows"][-1]), flush=True)
            save(output, results)
    finally:
        for worker in workers.values():
            worker.stop()
    results["seconds"] = time.monotonic() - started
    save(output, results)
    (output / "peers.md").write_text(peers_report.markdown(results))
    for name, picture in peers_report.pictures(results).items():
        (output / name).write_text(picture)
    print(f"written to {output}: peers.md, peers.json and the pictures")


def warm(workers, does, todo, common, limit):
    """Compiles everybody's kernels at once, on short sequences: nothing is timed meanwhile."""
    shapes = {}
    for cell in todo:
        if "recorded" not in cell:
            key = (cell["what"], cell["heads"] // cell["kv_heads"], cell["key_dim"])
            shapes.setdefault(key, {**cell, **common, "tokens": 2048, "seconds": 0, "batch": 1})
    deadline = time.monotonic() + limit
    for cell in shapes.values():
        asked = []
        for worker in workers.values():
            if worker.cannot is None and cell["what"] in does[worker.name]:
                worker.send(cell)
                asked.append(worker)
        for worker in asked:
            if worker.cannot is None:
                worker.read(max(deadline - time.monotonic(), 5))


def save(output, results):
    """Whole or not at all."""
    beside = output / "peers.json.tmp"
    beside.write_text(json.dumps(results, indent=1))
    beside.replace(output / "peers.json")


if __name__ == "__main__":
    main()
