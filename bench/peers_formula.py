"""The formulas in float64, on sampled queries: what `peers.py` checks every kernel against.

Written from the equations (arXiv 2502.11089), independent of Tercet's own code. One sequence.
"""

import torch


class Shape:
    """Sizes of an attention problem, and the spec when it is sparse."""

    def __init__(self, tokens, heads, kv_heads, key_dim, value_dim, spec=None):
        self.tokens, self.heads, self.kv_heads = tokens, heads, kv_heads
        self.key_dim, self.value_dim = key_dim, value_dim
        # (l, d, l', n, initial, local, window)
        self.spec = spec


def compressed(x, block, stride, round_to):
    """Means of blocks of `block` tokens, `stride` apart, rounded as a kernel would store them."""
    rows = x.double().unfold(0, block, stride).mean(-1)
    return rows.to(round_to).double()


def attend_rows(q, k, v, visible, scale):
    """q [R, H, D], k [n, K, D], v [n, K, V], visible [R, K or 1, n] -> [R, H, V], p [R, H, n]."""
    rows, heads, _ = q.shape
    group = heads // k.shape[1]
    logits = torch.einsum("rkgd,nkd->rkgn", q.unflatten(1, (-1, group)), k) * scale
    logits = logits.masked_fill(~visible.unsqueeze(2), -torch.inf)
    p = torch.softmax(logits, -1).nan_to_num(0.0)  # a row that sees nothing is 0
    return torch.einsum("rkgn,nkv->rkgv", p, v).flatten(1, 2), p


def importance(p, spec, blocks):
    """Scores of selection blocks [R, K, J] from p [R, K, G, n], by shared chunks of `stride`."""
    block, stride, select, *_ = spec
    chunks = p.sum(2)
    count = chunks.shape[-1]
    scores = chunks.new_zeros(*chunks.shape[:2], blocks)
    for i in range(count):
        start = i * stride  # this compressed block's tokens: start to start + block
        for j in range(start // select, min((start + block - 1) // select + 1, blocks)):
            shared = min(start + block, (j + 1) * select) - max(start, j * select)
            scores[..., j] += chunks[..., i] * (shared // stride)
    return scores


def choose(scores, positions, spec):
    """Chosen blocks as a mask [R, K, J], and the margin by which the last one was chosen [R, K]."""
    _, _, select, count, initial, local, _ = spec
    j = torch.arange(scores.shape[-1], device=scores.device)
    own = (positions // select).view(-1, 1, 1)
    candidate = j <= own
    forced = candidate & ((j < initial) | (j > own - local))
    ranked = scores.masked_fill(forced, torch.inf).masked_fill(~candidate, -torch.inf)
    order = ranked.sort(dim=-1, descending=True, stable=True)
    chosen = torch.zeros_like(candidate.expand_as(scores))
    chosen.scatter_(-1, order.indices[..., :count], True)
    chosen &= candidate
    if scores.shape[-1] <= count:
        return chosen, torch.full(scores.shape[:2], torch.inf, device=scores.device)
    last, first_out = order.values[..., count - 1], order.values[..., count]
    margin = (last - first_out) / last.abs().clamp(min=1e-30)
    return chosen, margin.nan_to_num(torch.inf)


def dense(shape, rows, k, v, positions):
    """Causal attention of the queries `rows` [R, H, D] at `positions`; k and v are whole."""
    key = torch.arange(shape.tokens, device=k.device)
    visible = (key <= positions.view(-1, 1)).unsqueeze(1)
    out, _ = attend_rows(rows.double(), k.double(), v.double(), visible, shape.key_dim**-0.5)
    return out


def nsa(shape, rows, k, v, gate, positions):
    """The whole operator for the queries `rows` [R, H, D] at `positions`, with their gates
    [R, H, 3] after the sigmoid; k and v are whole and serve all branches. Returns the output
    [R, H, V], the chosen blocks [R, K, J] and the margin of the choice [R, K]."""
    block, stride, select, _, _, _, window = shape.spec
    scale, dtype, rows, g = shape.key_dim**-0.5, k.dtype, rows.double(), gate.double()
    k_cmp, v_cmp = (compressed(x, block, stride, dtype) for x in (k, v))
    at = positions.view(-1, 1)
    ends = torch.arange(k_cmp.shape[0], device=k.device) * stride + block
    cmp, p = attend_rows(rows, k_cmp, v_cmp, (ends <= at + 1).unsqueeze(1), scale)
    blocks = -(-shape.tokens // select)
    scores = importance(p.detach(), shape.spec, blocks)
    chosen, margin = choose(scores, positions, shape.spec)
    key = torch.arange(shape.tokens, device=k.device)
    causal = (key <= at).unsqueeze(1)
    k64, v64 = k.double(), v.double()
    slc, _ = attend_rows(rows, k64, v64, chosen[..., key // select] & causal, scale)
    win, _ = attend_rows(rows, k64, v64, causal & (key > at - window).unsqueeze(1), scale)
    out = g[..., 0:1] * cmp + g[..., 1:2] * slc + g[..., 2:3] * win
    return out, chosen, margin


def sample(tokens, count, device):
    """Positions spread over the sequence, first and last among them."""
    generator = torch.Generator().manual_seed(tokens)
    inner = torch.randint(0, tokens, (max(count - 2, 0),), generator=generator)
    return torch.cat([torch.tensor([0, tokens - 1]), inner]).unique().to(device)


def overlap(shape, q, k, v, gate, groups=48, neighbours=4):
    """How much neighbouring queries' choices agree: the mean share of blocks that a query has in
    common with the next, and the size of the union of `neighbours` queries over one's."""
    first = sample(shape.tokens - neighbours, groups, q.device)
    first = first[first >= shape.spec[2] * shape.spec[3]]  # before that everything is chosen
    if not len(first):
        return None
    positions = (first.view(-1, 1) + torch.arange(neighbours, device=q.device)).flatten()
    chosen = []
    for part in positions.split(16):
        chosen.append(nsa(shape, q[part], k, v, gate[part], part)[1])
    chosen = torch.cat(chosen).unflatten(0, (-1, neighbours)).double()
    common = (chosen[:, 1:] * chosen[:, :-1]).sum(-1) / chosen[:, 1:].sum(-1)
    union = chosen.amax(1).sum(-1) / chosen[:, 0].sum(-1)
    return {"common": common.mean().item(), "union": union.mean().item(), "of": neighbours}


def relative(got, want):
    """Error of each row [R], relative to the row's norm, or to a tenth of the largest: a gradient
    that vanishes (a query that sees one key has none) leaves only rounding."""
    difference = (got.double() - want).flatten(1).norm(dim=1)
    norms = want.flatten(1).norm(dim=1)
    return difference / norms.clamp(min=max(norms.max().item() / 10, 1e-30))
