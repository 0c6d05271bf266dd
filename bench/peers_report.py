"""What `peers.py` measured, as Markdown, as pictures, and as one line a cell."""

import html
import math

OURS, OURS_DENSE, DENSE = "tercet", "tercet attend", "FlashAttention-3"
# First mark and goal, on one H200, 64/4 heads, bf16: what, table, cell, measure, mark, goal.
MARKS = (
    ("NSA forward, 64k, ms", dict(table="lengths", tokens=65536), "forward", 22, 11.6),
    ("NSA backward, 64k, ms", dict(table="lengths", tokens=65536), "backward", 60, 55),
    ("decode, 8 GB of cache, 64k, ms", dict(table="decode", tokens=65536), "step", 0.21, 0.167),
    ("decode, batch 1, 64k, ms", dict(table="decode1", tokens=65536), "step", 0.040, 0.015),
    ("NSA forward, 8k, ms", dict(table="lengths", tokens=8192), "forward", 2.0, None),
    ("NSA forward, 16k, ms", dict(table="lengths", tokens=16384), "forward", 4.2, None),
    ("NSA forward, 32k, ms", dict(table="lengths", tokens=32768), "forward", 9.5, None),
    ("NSA forward, 64k, d 192/128, ms", dict(table="dims", tokens=65536), "forward", 29, 16.6),
)


def size(tokens):
    return f"{tokens >> 10}k" if tokens % 1024 == 0 else str(tokens)


def milliseconds(ms):
    return f"{ms:.3f}" if ms < 1 else f"{ms:.2f}" if ms < 10 else f"{ms:.1f}"


def gib(count):
    return f"{count / (1 << 30):.2f}"


def line(row):
    """One cell, as it is printed while measuring."""
    what = f"{row['table']:9} {size(row['tokens']):>5} {row['heads']}/{row['kv_heads']}"
    what += f" d{row['key_dim']}/{row['value_dim']} b{row.get('batch', 1)} {row['peer']:<31}"
    if "cannot" in row:
        return f"{what} -- {row['cannot']}"
    parts = [
        f"{name} {milliseconds(row[name]['ms'])}"
        for name in ("forward", "backward", "both", "step")
        if name in row
    ]
    parts.append(f"error {row['error']:.1e}/{row['worst']:.1e}")
    if "d_q_error" in row:
        parts.append(f"dq {row['d_q_error']:.1e}/{row['d_q_worst']:.1e}")
    if "training_bytes" in row:
        parts.append(f"memory {gib(row['forward_bytes'])}/{gib(row['training_bytes'])} GiB")
    for name in ("backward_cannot", "overlap"):
        if row.get(name):
            parts.append(f"{name} {row[name]}")
    if row.get("graph") not in (None, True):
        parts.append(f"no graph: {row['graph']}")
    return f"{what} {'WRONG ' if row['wrong'] else ''}{', '.join(parts)}"


def columns(rows):
    """What tells the cells of a table apart, in order."""
    keys = []
    for row in rows:
        key = (row["tokens"], row["kv_heads"], row.get("batch", 1))
        if key not in keys:
            keys.append(key)
    return keys


def cell_of(rows, peer, key):
    for row in rows:
        if row["peer"] == peer and (row["tokens"], row["kv_heads"], row.get("batch", 1)) == key:
            return row
    return None


def table(rows, measure, heading, show):
    """Peers down, cells across."""
    keys = columns(rows)
    peers = list(dict.fromkeys(row["peer"] for row in rows))
    out = [f"| {heading} | " + " | ".join(head(rows, key) for key in keys) + " |"]
    out.append("|---" * (len(keys) + 1) + "|")
    notes = {}
    for peer in peers:
        cells = []
        for key in keys:
            row = cell_of(rows, peer, key)
            reason = None if row is None else row.get("cannot")
            if row is not None and reason is None and measure not in row:
                reason = row.get("backward_cannot", "not measured")
            if row is None or reason:
                cells.append("—")
                notes.setdefault(peer, {}).setdefault(reason or "not measured", []).append(key)
            else:
                cells.append(("**wrong** " if row["wrong"] else "") + show(row[measure]))
        out.append(f"| {peer} | " + " | ".join(cells) + " |")
    for peer, reasons in notes.items():
        for reason, where in reasons.items():
            place = "" if len(where) == len(keys) else " at " + ", ".join(head(rows, k) for k in where)
            out.append(f"\n— {peer}{place}: {reason}")
    return "\n".join(out) + "\n"


def head(rows, key):
    tokens, kv_heads, batch = key
    row = next(r for r in rows if (r["tokens"], r["kv_heads"], r.get("batch", 1)) == key)
    text = size(tokens)
    if len({r["kv_heads"] for r in rows}) > 1:
        text = f"G {row['heads'] // kv_heads}"
    if len({r.get("batch", 1) for r in rows}) > 1:
        text += f" × {batch}"
    return text


def crossing(ours, theirs):
    """The length from which ours is faster, between measured ones on a log-log line."""
    both = sorted(set(ours) & set(theirs))
    if not both:
        return None
    if ours[both[0]] <= theirs[both[0]]:
        return f"below {size(both[0])}"
    for low, high in zip(both, both[1:]):
        if ours[high] <= theirs[high]:
            before = math.log(ours[low] / theirs[low])
            after = math.log(theirs[high] / ours[high])
            share = before / (before + after)
            at = math.exp(math.log(low) + share * math.log(high / low))
            return f"{at / 1024:.1f}k"
    return f"above {size(both[-1])}"


def times(rows, peer, measure):
    return {
        row["tokens"]: row[measure]["ms"]
        for row in rows
        if row["peer"] == peer and measure in row and not row["wrong"]
    }


def break_even(results):
    """From which length each sparse implementation beats each dense one."""
    rows = [row for row in results["rows"] if row["table"] == "lengths"]
    kinds = results["kinds"]
    dense = [name for name, kind in kinds.items() if kind == "dense"]
    out = ["| from this length faster than … | " + " | ".join(dense) + " |"]
    out.append("|---" * (len(dense) + 1) + "|")
    for measure in ("forward", "both"):
        for name in (name for name, kind in kinds.items() if kind == "nsa"):
            mine = times(rows, name, measure)
            cells = [crossing(mine, times(rows, other, measure)) or "—" for other in dense]
            label = {"forward": "forward", "both": "forward + backward"}[measure]
            out.append(f"| {name}, {label} | " + " | ".join(cells) + " |")
    return "\n".join(out) + "\n"


def tflops(row):
    """Of a dense forward: half of the square is computed."""
    pairs = row["tokens"] * (row["tokens"] + 1) / 2
    flop = 2 * pairs * row["heads"] * (row["key_dim"] + row["value_dim"])
    return flop / row["forward"]["ms"] / 1e9


def dense_rates(rows, kinds):
    dense = [row for row in rows if kinds.get(row["peer"]) == "dense" and "forward" in row]
    return ", ".join(f"{row['peer']} {size(row['tokens'])}: {tflops(row):.0f}" for row in dense)


def verdict(label, first, goal, value, good, unit=milliseconds):
    shown = "—" if goal is None else goal
    return f"| {label} | {first} | {shown} | {unit(value)} | {'met' if good else 'missed'} |"


def marks(results):
    """The marks that this run can judge."""
    rows = [row for row in results["rows"] if "cannot" not in row and not row["wrong"]]
    out = []
    for label, where, measure, first, goal in MARKS:
        for row in rows:
            same = all(row[k] == v for k, v in where.items())
            if row["peer"] == OURS and same and measure in row:
                ms = row[measure]["ms"]
                out.append(verdict(label, first, goal, ms, ms <= first))
    number = lambda value: f"{value:.3g}"
    for row in rows:
        if row["table"] == "lengths" and row["tokens"] == 65536 and "forward" in row:
            if row["peer"] == OURS_DENSE:
                rate = tflops(row)
                out.append(
                    verdict("dense forward, 64k, TFLOP/s", 550, 680, rate, rate >= 550, number)
                )
            if row["peer"] == OURS:
                share = 100 * row["extra"]
                out.append(
                    verdict("extra memory, forward, 64k, %", 25, 10, share, share <= 25, number)
                )
    groups = {
        row["heads"] // row["kv_heads"]: row["forward"]["ms"]
        for row in rows
        if row["table"] == "groups" and row["peer"] == OURS and "forward" in row
    }
    for group, first, goal in ((4, 1.6, 1.3), (1, 4, 2)):
        if 16 in groups and group in groups:
            ratio = groups[group] / groups[16]
            label = f"G = {group} against G = 16, the same query heads"
            out.append(verdict(label, first, goal, ratio, ratio <= first, number))
    lengths = [row for row in results["rows"] if row["table"] == "lengths"]
    both = [times(lengths, name, "both") for name in (OURS, DENSE)]
    at = crossing(*both)
    if at is not None:
        small = float(at.rstrip("k").split()[-1]) <= 9 and not at.startswith("above")
        label = "break-even with FlashAttention-3, forward + backward"
        out.append(verdict(label, "9k", "6k", at, small, str))
    head = ["| mark | first | goal | measured | |", "|---|---|---|---|---|"]
    return "\n".join(head + out) + "\n" if out else ""


def markdown(results):
    machine = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    out = [
        "# Tercet and its peers\n",
        f"{machine['device']}, {machine['multiprocessors']} multiprocessors; {versions}; "
        f"{results['when']}; bf16, batch 1 unless said, seed {results['seed']}; medians in ms, "
        "second-level cache flushed before every run; checked against float64 on sampled queries.\n",
        f"    {results['command']}\n",
        "Sparse: block 32, stride 16, selection 64 × 16 (1 first, 2 last), window 512 (fla: block and "
        "stride 64); whole operator from q, k, v to the output, keys and values shared by the "
        "branches. Peers without a window kernel use FlashAttention's. Decoding: one step over caches that "
        "hold the new token, replayed from a CUDA graph where it can be captured; flash_nsa and tercet step "
        "also average the new block, and tercet step appends the token.\n",
    ]
    rows = lambda name: [row for row in results["rows"] if row["table"] == name]
    show = lambda timed: milliseconds(timed["ms"])
    titles = {"forward": "Forward", "backward": "Backward", "both": "Forward + backward"}
    lengths = rows("lengths")
    if lengths:
        for measure, title in titles.items():
            out += [f"## {title}, {sizes(lengths)}\n", table(lengths, measure, "ms", show)]
        out += [f"Dense forward in TFLOP/s: {dense_rates(lengths, results['kinds'])}\n"]
        out += ["## Break-even\n", break_even(results)]
        out += ["## Memory above the inputs, forward alone (GiB)\n"]
        out += [table(lengths, "forward_bytes", "GiB", gib)]
        out += ["## Memory above inputs and output, forward alone, as a share of q + k + v + o\n"]
        out += [table(lengths, "extra", "share", lambda share: f"{share:.0%}")]
        out += ["## Memory above the inputs, training (GiB)\n"]
        out += [table(lengths, "training_bytes", "GiB", gib)]
    if rows("decode"):
        out += [f"## Decoding, full batch, {sizes(rows('decode'))}\n"]
        out += [table(rows("decode"), "step", "ms a step", show)]
    if rows("decode1"):
        out += [f"## Decoding, batch 1, {sizes(rows('decode1'))}\n"]
        out += [table(rows("decode1"), "step", "ms a step", show)]
    if rows("groups"):
        tokens = size(rows("groups")[0]["tokens"])
        for measure, title in titles.items():
            out += [f"## {title} by group size, {tokens}, the same number of query heads\n"]
            out += [table(rows("groups"), measure, "ms", show)]
    if rows("dims"):
        for measure, title in titles.items():
            out += [f"## {title}, {sizes(rows('dims'))}\n", table(rows("dims"), measure, "ms", show)]
    for file in dict.fromkeys(row["recorded"] for row in rows("recorded")):
        part = [row for row in rows("recorded") if row["recorded"] == file]
        for measure, title in titles.items():
            out += [f"## {title}, recorded data ({file}), {sizes(part)}\n"]
            out += [table(part, measure, "ms", show)]
    agreed = [row for row in results["rows"] if isinstance(row.get("overlap"), dict) and row["peer"] == OURS]
    for row in agreed:
        share, union = row["overlap"]["common"], row["overlap"]["union"]
        data = "recorded" if row["table"] == "recorded" else "random"
        out.append(
            f"Neighbouring queries, {data} data, {size(row['tokens'])}: {share:.0%} of the blocks are "
            f"the next query's too; {row['overlap']['of']} neighbours together read {union:.2f} × one.\n"
        )
    reached = marks(results)
    if reached:
        out += ["## Marks\n", reached]
    out += ["## Errors (median and worst relative error of sampled rows)\n"]
    out += ["| peer | output | query's gradient |", "|---|---|---|"]
    for peer in dict.fromkeys(row["peer"] for row in results["rows"]):
        done = [row for row in results["rows"] if row["peer"] == peer and "error" in row]
        if done:
            grads = [row for row in done if "d_q_error" in row]
            pair = lambda a, b, some: (
                f"{max(r[a] for r in some):.1e} / {max(r[b] for r in some):.1e}" if some else "—"
            )
            out.append(
                f"| {peer} | {pair('error', 'worst', done)} | {pair('d_q_error', 'd_q_worst', grads)} |"
            )
    return "\n".join(out) + "\n"


def sizes(rows):
    row = rows[0]
    return f"{row['heads']}/{row['kv_heads']} heads, d {row['key_dim']}/{row['value_dim']}"


def pictures(results):
    """Log-log curves over the length, by file name."""
    out = {}
    for name in ("lengths", "dims", "decode", "decode1"):
        rows = [row for row in results["rows"] if row["table"] == name]
        for measure in ("forward", "backward", "both", "step"):
            peers = dict.fromkeys(row["peer"] for row in rows)
            curves = {peer: times(rows, peer, measure) for peer in peers}
            curves = {peer: points for peer, points in curves.items() if len(points) > 1}
            if curves:
                title = f"{measure}, ms, {sizes(rows)}"
                out[f"{name}-{measure}.svg"] = chart(title, curves, results["kinds"])
    return out


COLOURS = ("#c0392b", "#e67e22", "#2c3e50", "#2980b9", "#16a085", "#7f8c8d", "#8e44ad", "#27ae60",
           "#d4a017", "#a04000")


def chart(title, curves, kinds):
    """Dense kernels are dashed; ours is thick."""
    width, height, left, right, top, bottom = 760, 440, 60, 220, 40, 40
    xs = sorted({x for points in curves.values() for x in points})
    ys = [y for points in curves.values() for y in points.values()]
    low, high = math.floor(math.log10(min(ys))), math.ceil(math.log10(max(ys)) + 1e-9)
    span = max(math.log2(xs[-1] / xs[0]), 1e-9)
    at_x = lambda x: left + (width - left - right) * math.log2(x / xs[0]) / span
    at_y = lambda y: height - bottom - (height - top - bottom) * (math.log10(y) - low) / (high - low)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{left}" y="22" font-size="15">{html.escape(title)}</text>',
    ]
    for power in range(low, high + 1):
        y = at_y(10**power)
        parts.append(f'<path d="M{left} {y:.1f}H{width - right}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{10**power:g}</text>')
    for x in xs:
        parts.append(
            f'<text x="{at_x(x):.1f}" y="{height - bottom + 18}" text-anchor="middle">{size(x)}</text>'
        )
    for i, (peer, points) in enumerate(curves.items()):
        colour = COLOURS[i % len(COLOURS)]
        stroke = 3 if peer == OURS else 1.5
        dash = ' stroke-dasharray="5 4"' if kinds.get(peer) == "dense" else ""
        path = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in sorted(points.items()))
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{stroke}"{dash}/>'
        )
        y = top + 18 * i
        parts.append(f'<path d="M{width - right + 14} {y}h24" stroke="{colour}" '
                     f'stroke-width="{stroke}"{dash}/>')
        parts.append(f'<text x="{width - right + 44}" y="{y + 4}">{html.escape(peer)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"
