"""Native sparse attention from the paper's equations, with dense masks and loops.

Runs in whatever dtype its inputs have: float64 is the truth, the storage dtype is the plain formula
whose error bounds what a kernel may be off. Nothing here comes from the package.
"""

import torch


def sequences(tokens, cu_seqlens):
    cu = [0, tokens] if cu_seqlens is None else list(cu_seqlens)
    return list(zip(cu, cu[1:]))


def softmax_attend(q, k, v, visible, scale):
    """q [T, H, D], k [n, K, D], v [n, K, V], visible [T, K, n] -> out [T, H, V], p [T, K, G, n]."""
    tokens, heads, dim = q.shape
    kv_heads = k.shape[1]
    grouped = q.reshape(tokens, kv_heads, heads // kv_heads, dim)
    logits = torch.einsum("tkgd,nkd->tkgn", grouped, k) * scale
    logits = logits.masked_fill(~visible.unsqueeze(2), -torch.inf)
    seen = visible.any(-1)[:, :, None, None]
    p = torch.softmax(torch.where(seen, logits, torch.zeros_like(logits)), -1)
    p = torch.where(seen, p, torch.zeros_like(p))
    out = torch.einsum("tkgn,nkv->tkgv", p, v)
    return out.reshape(tokens, heads, v.shape[-1]), p


def attend(q, k, v, cu_seqlens=None, window=None, scale=None):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    outs = [q[:0].new_zeros(0, q.shape[1], v.shape[2])]
    for a, b in sequences(q.shape[0], cu_seqlens):
        t = torch.arange(b - a, device=q.device)
        visible = t[None] <= t[:, None]
        if window is not None:
            visible &= t[None] > t[:, None] - window
        visible = visible[:, None].expand(-1, k.shape[1], -1)
        outs.append(softmax_attend(q[a:b], k[a:b], v[a:b], visible, scale)[0])
    return torch.cat(outs)


def blocks_of(length, spec):
    if length < spec.compress_block:
        return 0
    return (length - spec.compress_block) // spec.compress_stride + 1


def compress(x, phi, cu_seqlens, spec):
    """phi(flattened block [K, l*C]) -> [K, C]."""
    rows = [x[:0]]
    for a, b in sequences(x.shape[0], cu_seqlens):
        for i in range(blocks_of(b - a, spec)):
            start = a + i * spec.compress_stride
            rows.append(phi(x[start : start + spec.compress_block])[None])
    return torch.cat(rows)


def mean_phi(block):
    return block.mean(0)


def linear_phi(weight, pe):
    def phi(block):  # [l, K, C]
        flat = (block.transpose(0, 1) + pe).flatten(1)
        return torch.einsum("ki,kio->ko", flat, weight)

    return phi


def mlp_phi(weight1, bias1, weight2, bias2, pe):
    def phi(block):
        flat = (block.transpose(0, 1) + pe).flatten(1)
        hidden = torch.einsum("ki,kim->km", flat, weight1) + bias1
        return torch.einsum("km,kmo->ko", torch.nn.functional.gelu(hidden), weight2) + bias2

    return phi


def shared_chunks(blocks, selections, spec):
    """How many strides compressed block i and selection block j have in common [N, J]."""
    stride = spec.compress_stride
    shared = torch.zeros(blocks, selections, dtype=torch.float64)
    for i in range(blocks):
        mine = set(range(i, i + spec.compress_block // stride))
        for j in range(selections):
            r = spec.select_block // stride
            shared[i, j] = len(mine & set(range(r * j, r * (j + 1))))
    return shared


def choose(scores, spec):
    """scores [T, K, J] -> blocks [T, K, S]: forced ones, then best first, lower index on ties."""
    tokens, kv_heads, _ = scores.shape
    chosen = torch.full((tokens, kv_heads, spec.select_count), -1, dtype=torch.int32)
    for t in range(tokens):
        own = t // spec.select_block
        forced = {j for j in range(own + 1) if j < spec.select_initial or j > own - spec.select_local}
        free = spec.select_count - len(forced)
        for k in range(kv_heads):
            row = scores[t, k].tolist()
            ranked = sorted((j for j in range(own + 1) if j not in forced), key=lambda j: (-row[j], j))
            blocks = sorted(forced | set(ranked[:free]))
            chosen[t, k, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
    return chosen


def nsa(q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gate, cu_seqlens, spec, scale=None, indices=None):
    """Output [T, H, V], choice [T, K, S], and each choice's summed score [T, K] by these scores."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    kv_heads, device = k_slc.shape[1], q.device
    outs, choices, totals, first = [], [], [], 0
    for a, b in sequences(q.shape[0], cu_seqlens):
        n, length = blocks_of(b - a, spec), b - a
        if length == 0:
            continue
        t = torch.arange(length, device=device)
        ends = torch.arange(n, device=device) * spec.compress_stride + spec.compress_block
        seen = (ends[None] <= t[:, None] + 1)[:, None].expand(-1, kv_heads, -1)
        cmp, p = softmax_attend(q[a:b], k_cmp[first : first + n], v_cmp[first : first + n], seen, scale)
        selections = -(-length // spec.select_block)
        weights = shared_chunks(n, selections, spec).to(device)
        scores = p.detach().double().sum(2) @ weights
        if indices is None:
            choice = choose(scores.cpu(), spec).to(device)
        else:
            choice = indices[a:b]
        listed = torch.zeros(length, kv_heads, selections + 1, dtype=torch.bool, device=device)
        place = torch.where(choice < 0, selections, choice).long()
        listed.scatter_(-1, place, True)
        listed = listed[..., :selections]
        totals.append((scores * listed).sum(-1))
        causal = (t[None] <= t[:, None])[:, None]
        slc, _ = softmax_attend(
            q[a:b], k_slc[a:b], v_slc[a:b], listed[..., t // spec.select_block] & causal, scale
        )
        near = causal & (t[None] > t[:, None] - spec.window)[:, None]
        win, _ = softmax_attend(
            q[a:b], k_win[a:b], v_win[a:b], near.expand(-1, kv_heads, -1), scale
        )
        g = gate[a:b]
        outs.append(g[..., 0:1] * cmp + g[..., 1:2] * slc + g[..., 2:3] * win)
        choices.append(choice)
        first += n
    if not outs:
        return q.new_zeros(0, q.shape[1], v_slc.shape[2]), None, None
    return torch.cat(outs), torch.cat(choices), torch.cat(totals)
