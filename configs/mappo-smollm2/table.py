"""Prints the table of run.sh from what its runs left behind: table.py RUNS

Rewards are means over seeds of the mean over held-out prompts. The interval is 95 %, from the spread
over seeds (Student's t) where there are several, else that over prompts.
"""

import collections
import json
import pathlib
import statistics
import sys

# Student's t at 97.5 %, by number of seeds.
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


def ends(path, key):
    """First and last value of a measure."""
    found = []
    for line in path.read_text().splitlines():
        record = json.loads(line)
        if key in record:
            found.append(record[key])
    return (found[0], found[-1]) if found else (float("nan"),) * 2


def row(name, worths, curves):
    rewards = [worth["reward"] for worth in worths]
    if len(rewards) > 1:
        half = T95[len(rewards)] * statistics.stdev(rewards) / len(rewards) ** 0.5
    else:
        half = worths[0]["interval"]
    mean = lambda key: statistics.mean(worth[key] for worth in worths)
    moved = "–" if worths[0]["divergence"] is None else f"{mean('divergence'):.2f}"
    curve = "–"
    if curves:
        curve = "{:.1f} → {:.1f}".format(*(statistics.mean(side) for side in zip(*curves)))
    print(
        f"| {name} | {statistics.mean(rewards):.4f} ± {half:.4f} | {mean('length'):.1f} "
        f"| {mean('ended'):.2f} | {moved} | {curve} | {len(rewards)} |"
    )


def main():
    runs = pathlib.Path(sys.argv[1])
    worths, curves = collections.defaultdict(list), collections.defaultdict(list)
    for path in sorted((runs / "held-out").glob("*/summary.json")):
        name, seed = path.parent.name.rsplit("-", 1)
        worths[name].append(json.loads(path.read_text())["worth"])
        metrics = runs / f"offline-{name}-{seed}" / "metrics.jsonl"
        if metrics.exists():
            curves[name].append(ends(metrics, "logps/chosen"))
    for folder in sorted(runs.glob("iterative-*")):
        if not (folder / "report.md").exists():
            continue
        name = "iterative " + folder.name.removeprefix("iterative-").rsplit("-", 1)[0]
        rounds = sorted(folder.glob("round-*"), key=lambda path: int(path.name.split("-")[1]))
        worths[name].append(json.loads((rounds[-1] / "round.json").read_text())["held_out"])
        first = ends(rounds[1] / "train" / "metrics.jsonl", "logps/chosen")
        curves[name].append((first[0], ends(rounds[-1] / "train" / "metrics.jsonl", "logps/chosen")[1]))
    print("| method | held-out reward | tokens | ended | KL from the start | log p(chosen) | seeds |")
    print("|---|---|---|---|---|---|---|")
    for name in sorted(worths, key=lambda name: (name != "start", name.startswith("iterative"), name)):
        row(name, worths[name], curves[name])


if __name__ == "__main__":
    main()
