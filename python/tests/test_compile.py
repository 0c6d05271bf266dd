"""torch.compile and PyTorch's own checks of the operators."""

import pytest
import torch

import tercet
from test_nsa import SMALL, inputs

T, H, K, D, V = 90, 4, 2, 16, 8


def step(q, k, v, gate, cu_seqlens=None):
    k_cmp = tercet.compress(k, cu_seqlens=cu_seqlens, spec=SMALL)
    v_cmp = tercet.compress(v, cu_seqlens=cu_seqlens, spec=SMALL)
    out = tercet.nsa(q * 2, k_cmp, v_cmp, k, v, k, v, gate.sigmoid(), cu_seqlens, SMALL)
    return (out + tercet.attend(q, k, v, cu_seqlens, window=9)).square().sum()


def leaves(tokens, device):
    shapes = [(tokens, H, D), (tokens, K, D), (tokens, K, V), (tokens, H, 3)]
    return [torch.randn(s, device=device, requires_grad=True) for s in shapes]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_fullgraph_with_gradients(backend, device):
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for tokens in (T, T + 16, T + 48):  # the second makes the length symbolic
        tensors = leaves(tokens, device)
        want = step(*tensors)
        got = compiled(*tensors)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
        for a, b in zip(torch.autograd.grad(got, tensors), torch.autograd.grad(want, tensors)):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_offsets_change_without_recompiling(backend):
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    tensors = leaves(T, "cpu")
    for cu in ([0, 40, T], [0, 12, T], [0, 80, T]):
        offsets = torch.tensor(cu, dtype=torch.int32)
        with torch._dynamo.config.patch(error_on_recompile=cu[1] != 40):
            torch.testing.assert_close(compiled(*tensors, offsets), step(*tensors, offsets))


def test_what_does_not_fit_is_refused_while_tracing_too(device):
    torch._dynamo.reset()
    compiled = torch.compile(lambda q, k, v: tercet.attend(q, k, v), backend="aot_eager")
    q, k, v, _ = leaves(T, device)
    with pytest.raises(ValueError, match="^k"):
        compiled(q, k.detach()[:-1], v)


def test_pytorchs_own_checks(device):
    tensors = inputs(T, H, K, D, V, None, SMALL, torch.float32, device)
    numbers, scale = SMALL.numbers(), D**-0.5
    ops = torch.ops.tercet
    torch.library.opcheck(ops.nsa_forward.default, (*tensors, None, None, 1, numbers, scale, True, True))
    offsets = torch.tensor([0, 30, T], dtype=torch.int32)
    q, k, v = tensors[0], tensors[3], tensors[4]
    torch.library.opcheck(ops.attend_forward.default, (q, k, v, offsets, 1, None, scale))
    torch.library.opcheck(ops.attend_forward.default, (q, k, v, None, 2, 9, scale))
    if device == "cpu":  # on a GPU PyTorch's own operators compress
        torch.library.opcheck(ops.compress_forward.default, (k, [], None, 1, numbers))
        torch.library.opcheck(ops.compress_forward.default, (k, [], offsets, 1, numbers))


def test_checkpointing_recomputes_the_same(device):
    tensors = leaves(T, device)
    want = torch.autograd.grad(step(*tensors), tensors)
    for reentrant in (False, True):
        loss = torch.utils.checkpoint.checkpoint(step, *tensors, use_reentrant=reentrant)
        assert all(torch.equal(a, b) for a, b in zip(_grads(loss, tensors), want))


def _grads(loss, tensors):
    for tensor in tensors:
        tensor.grad = None
    loss.backward()
    return [tensor.grad for tensor in tensors]


def test_autocast_keeps_dtypes(device):
    q, k, v, _ = leaves(T, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert tercet.attend(q, k, v).dtype == torch.float32
        assert tercet.attend(q.bfloat16(), k.bfloat16(), v.bfloat16()).dtype == torch.bfloat16
