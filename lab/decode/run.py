"""Decode steps on Hopper: right first, then timed against the bytes they must read.

run.py check | sweep | table; run.py compile needs no device
"""
import sys

import torch

from check import case_steps, check
from steps import SPEC, Step, compile_all
from timing import DENSE, FULL, ONE, TABLE, sweep, table


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
