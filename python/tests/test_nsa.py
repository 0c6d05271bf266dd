"""The operator and its gradients against the formula in float64."""

import pytest
import torch

import formula
import tercet
from conftest import close

NAMES = ["q", "k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win", "gate"]
SMALL = tercet.Spec(8, 4, 16, 4, 1, 2, 24)
CASES = {
    # tokens, H, K, D, V, cu_seqlens, spec
    "grouped": (300, 8, 2, 32, 24, None, SMALL),
    "one_query_head_each": (150, 3, 3, 16, 16, None, SMALL),
    "wide_group": (130, 32, 1, 64, 64, None, SMALL),
    "many_sequences": (333, 4, 2, 16, 32, [0, 3, 3, 100, 107, 333], SMALL),
    "blocks_do_not_overlap": (200, 4, 1, 24, 8, None, tercet.Spec(16, 16, 16, 3, 1, 1, 7)),
    "the_papers_spec": (1150, 4, 2, 48, 32, None, tercet.Spec()),
    "nothing_is_compressed_yet": (7, 4, 2, 16, 16, None, SMALL),
    "no_tokens": (0, 4, 2, 16, 16, None, SMALL),
}


def inputs(tokens, heads, kv_heads, key_dim, value_dim, cu, spec, dtype, device):
    blocks = sum(formula.blocks_of(b - a, spec) for a, b in formula.sequences(tokens, cu))
    made = [
        torch.randn(tokens, heads, key_dim),
        torch.randn(blocks, kv_heads, key_dim),
        torch.randn(blocks, kv_heads, value_dim),
        torch.randn(tokens, kv_heads, key_dim),
        torch.randn(tokens, kv_heads, value_dim),
        torch.randn(tokens, kv_heads, key_dim),
        torch.randn(tokens, kv_heads, value_dim),
        torch.rand(tokens, heads, 3),
    ]
    return [x.to(device, dtype).requires_grad_() for x in made]


def dtypes(device):
    return [torch.float32, torch.bfloat16] + ([torch.float16] if device == "cuda" else [])


@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_are_the_formulas(case, device):
    *sizes, cu, spec = CASES[case]
    for dtype in dtypes(device):
        tensors = inputs(*sizes, cu, spec, dtype, device)
        out, choice = tercet.nsa(*tensors, cu, spec, return_indices=True)
        d_out = torch.randn_like(out)
        grads = torch.autograd.grad(out, tensors, d_out)

        wide = [x.detach().double().requires_grad_() for x in tensors]
        want, _, total = formula.nsa(*wide, cu, spec, indices=choice)
        if sizes[0] == 0:
            assert out.shape == want.shape
            continue
        # The choice: no blocks score more, but for the rounding of the scores' float32 sums.
        best = formula.nsa(*wide, cu, spec)[2]
        assert (best - total <= 1e-5 * best).all(), case
        want_grads = torch.autograd.grad(want, wide, d_out.double(), allow_unused=True)
        same = [x.detach().clone().requires_grad_() for x in tensors]
        plain = formula.nsa(*same, cu, spec, indices=choice)[0]
        plain_grads = torch.autograd.grad(plain, same, d_out, allow_unused=True)
        close(f"{case} {dtype} out", out.detach(), want.detach(), plain.detach(), dtype)
        for name, got, truth, other in zip(NAMES, grads, want_grads, plain_grads):
            if truth is None:
                assert not got.any(), name
                continue
            close(f"{case} {dtype} d_{name}", got, truth, other, dtype)


def test_float32_chooses_the_formulas_blocks(device):
    *sizes, cu, spec = CASES["many_sequences"]
    tensors = inputs(*sizes, cu, spec, torch.float32, device)
    _, choice = tercet.nsa(*tensors, cu, spec, return_indices=True)
    wide = [x.detach().double() for x in tensors]
    assert torch.equal(choice.cpu(), formula.nsa(*wide, cu, spec)[1].cpu())


def test_short_sequences_select_everything_and_equal_dense_attention(device):
    spec = tercet.Spec(8, 4, 16, 8, 1, 2, 128)
    tensors = inputs(128, 4, 2, 32, 16, None, spec, torch.float32, device)
    q, _, _, k, v, k_win, v_win, _ = (x.detach() for x in tensors)
    for branch, keys, values in ((1, k, v), (2, k_win, v_win)):
        gate = torch.zeros_like(tensors[7].detach())
        gate[..., branch] = 1
        got = tercet.nsa(q, tensors[1].detach(), tensors[2].detach(), k, v, k_win, v_win, gate, spec=spec)
        want = formula.attend(q.double(), keys.double(), values.double())
        close(f"branch {branch}", got, want, formula.attend(q, keys, values), torch.float32)


def test_the_same_bits_every_time(device):
    *sizes, cu, spec = CASES["the_papers_spec"]
    tensors = inputs(*sizes, cu, spec, torch.bfloat16, device)
    d_out = torch.randn(sizes[0], sizes[1], sizes[4], device=device, dtype=torch.bfloat16)
    def once():
        out = tercet.nsa(*tensors, cu, spec)
        return [out.detach(), *torch.autograd.grad(out, tensors, d_out)]
    first = once()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, once()))


def test_without_gradients_the_output_is_the_same(device):
    *sizes, cu, spec = CASES["grouped"]
    tensors = inputs(*sizes, cu, spec, torch.bfloat16, device)
    with torch.no_grad():
        alone = tercet.nsa(*tensors, cu, spec)
    assert not alone.requires_grad
    close("no_grad", alone, tercet.nsa(*tensors, cu, spec).detach(), alone, torch.bfloat16)


def test_a_batch_dimension_is_sequences_of_one_length(device):
    tokens, spec = 90, SMALL
    tensors = inputs(2 * tokens, 4, 2, 16, 8, [0, tokens, 2 * tokens], spec, torch.float32, device)
    flat, choice = tercet.nsa(*tensors, [0, tokens, 2 * tokens], spec, return_indices=True)
    batched = [x.unflatten(0, (2, -1)) for x in tensors]
    out, chosen = tercet.nsa(*batched, spec=spec, return_indices=True)
    assert out.shape == (2, tokens, 4, 8) and chosen.shape == (2, tokens, 2, 4)
    assert torch.equal(out.flatten(0, 1), flat) and torch.equal(chosen.flatten(0, 1), choice)
    torch.autograd.grad(out.sum(), tensors)


def test_offsets_may_be_a_list_or_a_tensor(device):
    *sizes, cu, spec = CASES["many_sequences"]
    tensors = inputs(*sizes, cu, spec, torch.float32, device)
    want = tercet.nsa(*tensors, cu, spec)
    for offsets in (
        torch.tensor(cu, dtype=torch.int32),
        torch.tensor(cu),
        torch.tensor(cu, dtype=torch.int32, device=device),
    ):
        assert torch.equal(tercet.nsa(*tensors, offsets, spec), want)


def test_a_choice_from_elsewhere_is_used(device):
    *sizes, cu, spec = CASES["grouped"]
    tensors = inputs(*sizes, cu, spec, torch.float32, device)
    own = tercet.nsa(*tensors, cu, spec, return_indices=True)[1]
    other = own.clone()
    late = slice(100, None)  # there are more candidates than places there
    candidates = own[late].clone()
    candidates[..., 1] = 1 + (candidates[..., 1] == 1).int() * (candidates[..., 2] > 2).int()
    other[late] = tercet.layouts.canonical(candidates)
    other = torch.where((other < 0).any(-1, keepdim=True) & (own >= 0).all(-1, keepdim=True), own, other)
    assert not torch.equal(own, other)
    out, used = tercet.nsa(*tensors, cu, spec, indices=other, return_indices=True)
    assert torch.equal(used, other)
    d_out = torch.randn_like(out)
    grads = torch.autograd.grad(out, tensors, d_out)
    wide = [x.detach().double().requires_grad_() for x in tensors]
    want = formula.nsa(*wide, cu, spec, indices=other)[0]
    want_grads = torch.autograd.grad(want, wide, d_out.double())
    same = [x.detach().clone().requires_grad_() for x in tensors]
    plain = formula.nsa(*same, cu, spec, indices=other)[0]
    plain_grads = torch.autograd.grad(plain, same, d_out)
    close("out", out.detach(), want.detach(), plain.detach(), torch.float32)
    for name, got, truth, near in zip(NAMES, grads, want_grads, plain_grads):
        close(name, got, truth, near, torch.float32)


def test_shared_keys_get_the_sum_of_the_branches_gradients(device):
    spec = SMALL
    q, _, _, k, v, *_, gate = inputs(100, 4, 2, 16, 8, None, spec, torch.float32, device)
    def run(q, k, v, gate, op, shrink):
        k_cmp, v_cmp = shrink(k), shrink(v)
        return op(q, k_cmp, v_cmp, k, v, k, v, gate)
    out = run(q, k, v, gate, lambda *x: tercet.nsa(*x, spec=spec), lambda x: tercet.compress(x, spec=spec))
    d_out = torch.randn_like(out)
    grads = torch.autograd.grad(out, (q, k, v, gate), d_out)
    choice = tercet.nsa(q, tercet.compress(k, spec=spec), tercet.compress(v, spec=spec), k, v, k, v,
                        gate, spec=spec, return_indices=True)[1]
    def truth(dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v, gate)]
        op = lambda *x: formula.nsa(*x, None, spec, indices=choice)[0]
        made = run(*leaves, op, lambda x: formula.compress(x, formula.mean_phi, None, spec))
        return torch.autograd.grad(made, leaves, d_out.to(dtype))
    for name, got, want, plain in zip("qkvg", grads, truth(torch.float64), truth(torch.float32)):
        close(name, got, want, plain, torch.float32)


def test_gradcheck(device):
    # Central differences in float32: truncation eps^2/6 times a third derivative of order one, and
    # rounding 2^-24 of sums of order ten over eps. With eps = 1e-2 both stay below 1e-3. Every block
    # is selected, so that no step changes the choice.
    spec = tercet.Spec(4, 2, 4, 6, 1, 1, 6)
    tensors = inputs(20, 2, 1, 4, 3, None, spec, torch.float32, device)
    run = lambda *x: tercet.nsa(*x, spec=spec)
    assert torch.autograd.gradcheck(run, tensors, eps=1e-2, atol=1e-3, rtol=1e-2, nondet_tol=0.0)


def test_nan_in_one_token_stays_in_the_rows_that_see_it(device):
    spec = SMALL
    tensors = [x.detach() for x in inputs(200, 4, 2, 16, 16, [0, 120, 200], spec, torch.float32, device)]
    clean = tercet.nsa(*tensors, [0, 120, 200], spec)
    tensors[5] = tensors[5].clone()
    tensors[5][50] = torch.nan  # a window key
    out = tercet.nsa(*tensors, [0, 120, 200], spec)
    seeing = torch.zeros(200, dtype=torch.bool, device=device)
    seeing[50 : 50 + spec.window] = True
    assert torch.isnan(out[seeing]).all()
    assert torch.equal(out[~seeing], clean[~seeing])
