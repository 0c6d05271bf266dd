"""Choices of blocks in other layouts, there and back."""

import pytest
import torch

import tercet
from tercet import layouts

OURS = torch.tensor(
    [[[0, -1, -1], [0, -1, -1]], [[0, 1, -1], [0, 1, -1]], [[0, 2, 3], [1, 2, 3]]], dtype=torch.int32
)


def test_kts():
    theirs = layouts.to_kts(OURS)
    assert theirs.shape == (2, 3, 3) and theirs[1, 2].tolist() == [1, 2, 3] and theirs.is_contiguous()
    assert torch.equal(layouts.from_kts(theirs), OURS)


def test_bths():
    theirs = layouts.to_bths(OURS.repeat(2, 1, 1), batch=2)
    assert theirs.shape == (2, 3, 2, 3)
    assert torch.equal(layouts.from_bths(theirs), OURS.repeat(2, 1, 1))
    # Counts instead of padding: what lies beyond them is ignored.
    filled = OURS.masked_fill(OURS < 0, 7)[None].long()
    counts = (OURS >= 0).sum(-1)[None]
    assert torch.equal(layouts.from_bths(filled, counts), OURS)


def test_kts_padded_and_unordered():
    theirs = layouts.to_kts_padded(OURS, 4)
    assert theirs[0, 0].tolist() == [0, 4, 4]
    shuffled = theirs[..., torch.tensor([2, 0, 1])]
    assert torch.equal(layouts.from_kts_padded(shuffled, 4), OURS)


def test_canonical_sorts_and_drops_repeats():
    messy = torch.tensor([[5, -7, 2, 2, -1], [9, 1, 0, 3, 2]])
    want = [[2, 5, -1, -1, -1], [0, 1, 2, 3, 9]]
    assert layouts.canonical(messy).tolist() == want
    assert layouts.canonical(torch.tensor([[2**31 - 2, -(2**31)]], dtype=torch.int32)).tolist() == [
        [2**31 - 2, -1]
    ]


def test_round_trip_through_the_operator():
    spec = tercet.Spec(8, 4, 16, 4, 1, 2, 24)
    q, k, gate = torch.randn(200, 4, 16), torch.randn(200, 2, 16), torch.rand(200, 4, 3)
    k_cmp = tercet.compress(k, spec=spec)
    out, choice = tercet.nsa(q, k_cmp, k_cmp, k, k, k, k, gate, spec=spec, return_indices=True)
    for back in (
        layouts.from_kts(layouts.to_kts(choice)),
        layouts.from_bths(layouts.to_bths(choice)),
        layouts.from_kts_padded(layouts.to_kts_padded(choice, 13), 13),
    ):
        assert torch.equal(back, choice)
        assert torch.equal(tercet.nsa(q, k_cmp, k_cmp, k, k, k, k, gate, spec=spec, indices=back), out)


def test_what_does_not_fit_is_refused():
    for name, call in {
        "topk_idx": lambda: layouts.from_kts(OURS[0]),
        "indices": lambda: layouts.to_kts(OURS.float()),
        "block_indices": lambda: layouts.from_bths(OURS),
        "block_counts": lambda: layouts.from_bths(OURS[None], torch.ones(1, 2, 2, dtype=torch.int32)),
        "batch": lambda: layouts.to_bths(OURS, batch=2),
        "topk": lambda: layouts.from_kts_padded(OURS[0], 4),
    }.items():
        with pytest.raises(ValueError, match=f"^{name}"):
            call()
