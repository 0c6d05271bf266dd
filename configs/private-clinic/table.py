"""Prints the table of run.sh from what its runs left behind: table.py RUNS

Perplexities are of the held-out persons at a run's end; means over seeds, with a 95 % interval from
the spread over seeds (Student's t). "updates" is the first evaluation at which a run is as good as
dp-sgd of the same ε and seed is at its end, as a mean over the seeds that come so far.
"""

import collections
import json
import math
import pathlib
import statistics
import sys

# Student's t at 97.5 %, by number of seeds.
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


def spread(values, digits):
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) not in T95:
        return mean
    half = T95[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean} ± {half:.{digits}f}"


def evaluations(folder):
    """(step, held-out loss) in order."""
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(r["step"], r["validation_loss"]) for r in records if "validation_loss" in r]


def main():
    runs = pathlib.Path(sys.argv[1])
    found = collections.defaultdict(dict)
    for path in sorted(runs.glob("*/audit.json")):
        method, epsilon, seed = path.parent.name.rsplit("-", 2)
        promise = json.loads((path.parent / "privacy.json").read_text())
        audit = json.loads(path.read_text())
        found[float(epsilon), method][seed] = (evaluations(path.parent), promise, audit)
    print(
        "| ε | method | held-out perplexity | less than dp-sgd's, nats | updates to dp-sgd's end "
        "| ε by PLD | audit: ε ≥ | refuted | exposure, bits | AUC canaries | AUC members | seeds |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    order = lambda item: (item[0][0], statistics.mean(run[0][-1][1] for run in item[1].values()))
    for (epsilon, method), seeds in sorted(found.items(), key=order):
        ends = [curve[-1][1] for curve, _, _ in seeds.values()]
        baseline = {s: run[0][-1][1] for s, run in found.get((epsilon, "dp-sgd"), {}).items()}
        gains = [baseline[s] - run[0][-1][1] for s, run in seeds.items() if s in baseline]
        updates = []
        for seed, (curve, _, _) in seeds.items():
            there = [step for step, loss in curve if seed in baseline and loss <= baseline[seed]]
            updates += there[:1]
        bounds = [run[1]["epsilon"] for run in seeds.values() if run[1]["epsilon"] is not None]
        audits = [run[2] for run in seeds.values()]
        canaries = [audit["canaries"] for audit in audits]
        mean = lambda values: statistics.mean(values)
        print(
            f"| {epsilon:g} |" if epsilon else "| ∞ |",
            f"{method} | {spread([math.exp(end) for end in ends], 4)} |",
            f"{spread(gains, 4) if gains and method != 'dp-sgd' else '–'} |",
            f"{mean(updates):.0f} ({len(updates)} of {len(seeds)})" if updates else "–",
            f"| {max(bounds):.3f}" if bounds else "| none",
            f"| {max(c['epsilon'] for c in canaries):.3f} (largest)",
            f"| {sum(audit['refuted'] for audit in audits)} of {len(audits)}",
            f"| {mean([c['exposure']['mean'] for c in canaries]):.2f}",
            f"| {mean([c['membership']['auc'] for c in canaries]):.3f}",
            f"| {mean([audit['membership']['auc'] for audit in audits]):.3f} | {len(seeds)} |",
        )


main()
