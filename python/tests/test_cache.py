"""Decoding equals the whole sequence at once."""

import pytest
import torch

import tercet

SPEC = tercet.Spec(8, 4, 16, 4, 1, 2, 24)
T, H, K, D, V = 150, 4, 2, 16, 8


def random_inputs(dtype, device, *lead):
    q, gate = torch.randn(*lead, T, H, D), torch.rand(*lead, T, H, 3)
    keys = [torch.randn(*lead, T, K, D) for _ in range(3)]
    values = [torch.randn(*lead, T, K, V) for _ in range(3)]
    return [x.to(device, dtype) for x in (q, gate, *keys, *values)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunks", [[1] * T, [100, 1, 1, 48], [7] * 20 + [10]])
def test_steps_equal_the_whole(dtype, chunks, device):
    q, gate, k_raw, k_slc, k_win, v_raw, v_slc, v_win = random_inputs(dtype, device)
    want, choice = tercet.nsa(
        q, tercet.compress(k_raw, spec=SPEC), tercet.compress(v_raw, spec=SPEC),
        k_slc, v_slc, k_win, v_win, gate, spec=SPEC, return_indices=True,
    )
    cache = tercet.NsaCache(H, K, D, V, SPEC)
    k_tail = tercet.CompressTail(K, D, SPEC, dtype)
    v_tail = tercet.CompressTail(K, V, SPEC, dtype)
    outs, choices = [], []
    for part in torch.arange(T).split(chunks):
        a, b = int(part[0]), int(part[-1]) + 1
        out, chosen = cache.extend(
            q[a:b], k_tail.push(k_raw[a:b]), v_tail.push(v_raw[a:b]),
            k_slc[a:b], v_slc[a:b], k_win[a:b], v_win[a:b], gate[a:b], return_indices=True,
        )
        outs.append(out)
        choices.append(chosen)
    assert torch.equal(torch.cat(choices), choice)
    # The same sums in another order: a few roundings of a result of order one. In bfloat16 a device
    # rounds each branch before it blends them.
    assert (torch.cat(outs) - want).abs().max() <= 8 * torch.finfo(dtype).eps * want.abs().max()
    assert len(cache) == T and k_tail.blocks == SPEC.compressed_blocks(T) and cache.bytes > 0


@pytest.mark.parametrize("window", [None, 30])
def test_a_dense_cache_equals_the_whole(window, device):
    q, k, v = (torch.randn(T, h, D, device=device) for h in (H, K, K))
    cache = tercet.DenseCache(H, K, D, window=window)
    parts = [(0, 77)] + [(i, i + 1) for i in range(77, T)]
    got = torch.cat([cache.extend(q[a:b], k[a:b], v[a:b]) for a, b in parts])
    want = tercet.attend(q, k, v, window=window)
    assert (got - want).abs().max() <= 8 * torch.finfo(torch.float32).eps * want.abs().max()


def test_a_batch_advances_together(device):
    q, gate, k_raw, k_slc, k_win, v_raw, v_slc, v_win = random_inputs(torch.float32, device, 3)
    cache = tercet.NsaCache(H, K, D, V, SPEC, batch=3)
    tails = [tercet.CompressTail(K, C, SPEC, batch=3) for C in (D, V)]
    out = cache.extend(
        q, tails[0].push(k_raw), tails[1].push(v_raw), k_slc, v_slc, k_win, v_win, gate
    )
    whole = tercet.nsa(
        q, tercet.compress(k_raw, spec=SPEC), tercet.compress(v_raw, spec=SPEC),
        k_slc, v_slc, k_win, v_win, gate, spec=SPEC,
    )
    assert (out - whole).abs().max() < 1e-5


def test_what_does_not_fit_is_refused_and_changes_nothing(device):
    q, gate, k_raw, k_slc, k_win, v_raw, v_slc, v_win = random_inputs(torch.float32, device)
    cache = tercet.NsaCache(H, K, D, V, SPEC)
    k_cmp, v_cmp = tercet.compress(k_raw, spec=SPEC), tercet.compress(v_raw, spec=SPEC)
    good = dict(q=q, k_cmp=k_cmp, v_cmp=v_cmp, k_slc=k_slc, v_slc=v_slc, k_win=k_win, v_win=v_win, gate=gate)
    bad = dict(
        q=q[..., :-1].contiguous(), k_cmp=k_cmp[:-1], v_cmp=v_cmp[:, :1].contiguous(),
        k_slc=k_slc[:-1], v_slc=v_slc.bfloat16(), k_win=k_win.transpose(0, 1), v_win=v_win[0],
        gate=gate[..., :2].contiguous(),
    )
    for name, tensor in bad.items():
        with pytest.raises(ValueError, match=f"^{name}"):
            cache.extend(**{**good, name: tensor})
    assert len(cache) == 0
    with pytest.raises(ValueError, match="^x"):
        tercet.CompressTail(K, D, SPEC).push(k_raw.double())
    with pytest.raises(ValueError, match="^x"):
        tercet.CompressTail(K, D, SPEC).push(k_raw[..., :-1].contiguous())
    with pytest.raises(ValueError, match="^dtype"):
        tercet.CompressTail(K, D, SPEC, torch.float64)
    with pytest.raises(ValueError, match="^window"):
        tercet.DenseCache(H, K, D, window=0)
    with pytest.raises(ValueError, match="^batch"):
        tercet.NsaCache(H, K, D, batch=0)
    with pytest.raises(ValueError, match="^capacity"):
        tercet.NsaCache(H, K, D, capacity=-1)
    for name in ("heads", "kv_heads", "key_dim", "value_dim"):
        sizes = {"heads": H, "kv_heads": K, "key_dim": D, "value_dim": V, name: 0}
        with pytest.raises(ValueError, match=f"^{name}"):
            tercet.NsaCache(**sizes)
