"""Compressors and their gradients against the formula in float64."""

import pytest
import torch

import formula
import tercet
from conftest import close

SPEC = tercet.Spec(8, 4, 16, 4, 1, 2, 24)


def phi_of(kind, heads, dim, dtype, device):
    shapes = {
        "mean": [],
        "linear": [(heads, 8 * dim, dim), (heads, 8, dim)],
        "mlp": [(heads, 8 * dim, 10), (heads, 10), (heads, 10, dim), (heads, dim), (heads, 8, dim)],
    }[kind]
    tensors = [(torch.randn(s) * 0.3).to(device, dtype).requires_grad_() for s in shapes]
    wrap = {"mean": lambda: None, "linear": tercet.LinearPhi, "mlp": tercet.MlpPhi}[kind]
    plain = {"mean": lambda: formula.mean_phi, "linear": formula.linear_phi, "mlp": formula.mlp_phi}[kind]
    return tensors, wrap, plain


@pytest.mark.parametrize("kind", ["mean", "linear", "mlp"])
@pytest.mark.parametrize("cu", [None, [0, 5, 5, 30, 77]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_gradients_are_the_formulas(kind, cu, dtype, device):
    x = torch.randn(77, 2, 6).to(device, dtype).requires_grad_()
    params, wrap, plain_phi = phi_of(kind, 2, 6, dtype, device)
    out = tercet.compress(x, wrap(*params), cu, SPEC)
    d_out = torch.randn_like(out)
    results = [[out, *torch.autograd.grad(out, (x, *params), d_out)]]
    for number in (torch.float64, dtype):
        leaves = [t.detach().to(number).requires_grad_() for t in (x, *params)]
        made = formula.compress(leaves[0], plain_phi(*leaves[1:]), cu, SPEC)
        results.append([made, *torch.autograd.grad(made, leaves, d_out.to(number))])
    for i, (got, want, plain) in enumerate(zip(*results)):
        close(f"{kind} {i}", got.detach(), want.detach(), plain.detach(), dtype)


def test_the_module_starts_as_the_average(device):
    module = tercet.Compressor("linear", 2, 16, SPEC).to(device)
    x = torch.randn(100, 2, 16, device=device)
    assert (module(x) - tercet.compress(x, spec=SPEC)).abs().max() < 1e-6
    assert tercet.Compressor("mlp", 2, 16, SPEC, hidden=5).to(device)(x).shape == (24, 2, 16)
    with pytest.raises(ValueError, match="^kind"):
        tercet.Compressor("median", 2, 16)


def test_a_batch_dimension_is_sequences_of_one_length(device):
    x = torch.randn(3, 50, 2, 8, device=device)
    out = tercet.compress(x, spec=SPEC)
    assert out.shape == (3, 11, 2, 8)
    for i in range(3):
        assert torch.equal(out[i], tercet.compress(x[i], spec=SPEC))
    assert tercet.compress(x[:, :7].contiguous(), spec=SPEC).shape == (3, 0, 2, 8)


def test_positions_are_where_blocks_start(device):
    at = tercet.block_positions(77, [0, 5, 5, 30, 77], SPEC, device=device)
    want = [4 * i for length in (5, 0, 25, 47) for i in range(formula.blocks_of(length, SPEC))]
    assert at.tolist() == want
    assert tercet.block_positions(30, spec=SPEC).tolist() == [0, 4, 8, 12, 16, 20]
