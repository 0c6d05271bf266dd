"""Dense and window attention against the formula in float64."""

import pytest
import torch

import formula
import tercet
from conftest import close
from test_nsa import dtypes


@pytest.mark.parametrize("window", [None, 2, 40])
@pytest.mark.parametrize("cu", [None, [0, 1, 1, 90, 150]])
def test_output_and_gradients_are_the_formulas(window, cu, device):
    for dtype in dtypes(device):
        shapes = [(150, 6, 32), (150, 2, 32), (150, 2, 24)]
        tensors = [torch.randn(s).to(device, dtype).requires_grad_() for s in shapes]
        out, lse = tercet.attend(*tensors, cu, window, return_lse=True)
        assert lse.dtype == torch.float32 and not lse.requires_grad
        d_out = torch.randn_like(out)
        results = [[out, *torch.autograd.grad(out, tensors, d_out)]]
        for kind in (torch.float64, dtype):
            leaves = [x.detach().to(kind).requires_grad_() for x in tensors]
            made = formula.attend(*leaves, cu, window)
            results.append([made, *torch.autograd.grad(made, leaves, d_out.to(kind))])
        for name, got, want, plain in zip(("out", "d_q", "d_k", "d_v"), *results):
            close(f"{name} {dtype}", got.detach(), want.detach(), plain.detach(), dtype)


def test_a_window_of_one_key_returns_its_value(device):
    q, k, v = (torch.randn(30, 2, 16, device=device) for _ in range(3))
    assert torch.equal(tercet.attend(q, k, v, window=1), v)


def test_lse_is_the_logarithm_of_the_sum(device):
    q, k = torch.randn(50, 2, 16, device=device), torch.randn(50, 1, 16, device=device)
    _, lse = tercet.attend(q, k, k, return_lse=True, scale=0.5)
    logits = torch.einsum("thd,nd->thn", q.double(), k[:, 0].double()) * 0.5
    hidden = torch.ones(50, 50, dtype=torch.bool, device=device).triu(1)
    want = logits.masked_fill(hidden.unsqueeze(1), -torch.inf).logsumexp(-1)
    assert (lse - want).abs().max() < 1e-5  # sums of order five in float32


def test_a_batch_dimension_is_sequences_of_one_length(device):
    q, k, v = (torch.randn(3, 40, h, 16, device=device) for h in (4, 2, 2))
    out = tercet.attend(q, k, v, window=9)
    for i in range(3):
        assert torch.equal(out[i], tercet.attend(q[i], k[i], v[i], window=9))


def test_gradcheck(device):
    # See test_nsa.test_gradcheck for the tolerances.
    tensors = [torch.randn(12, h, 4, device=device, requires_grad=True) for h in (2, 1, 1)]
    for window in (None, 5):
        run = lambda *x: tercet.attend(*x, window=window)
        assert torch.autograd.gradcheck(run, tensors, eps=1e-2, atol=1e-3, rtol=1e-2, nondet_tol=0.0)
