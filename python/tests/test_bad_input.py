"""What does not fit is a ValueError that begins with the argument's name. Never a crash."""

import pytest
import torch

import tercet
from test_nsa import NAMES, SMALL, inputs

T, H, K, D, V = 90, 4, 2, 16, 8


@pytest.fixture
def good(device):
    tensors = inputs(T, H, K, D, V, None, SMALL, torch.float32, device)
    return dict(zip(NAMES, (x.detach() for x in tensors)))


def refused(name, call):
    with pytest.raises(ValueError) as caught:
        call()
    assert str(caught.value).startswith(name), str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_shapes_dtypes_strides(good, name):
    x = good[name]
    run = lambda bad: tercet.nsa(**{**good, name: bad}, spec=SMALL)
    # One row less, one head less, one number less. A wrong q makes others wrong; they are named.
    for dim in range(3):
        with pytest.raises(ValueError) as caught:
            run(x.narrow(dim, 0, x.shape[dim] - 1).contiguous())
        first = str(caught.value).split(":")[0]
        assert first == name or name in ("q", "v_slc"), str(caught.value)
        assert first in NAMES, str(caught.value)
    refused("q" if name == "q" else name, lambda: run(x[0]))
    refused(name, lambda: run(x.transpose(0, 1).contiguous().transpose(0, 1)))
    if name != "q":
        refused(name, lambda: run(x.double()))
        refused(name, lambda: run(x.to(torch.int32)))
        refused(name, lambda: run(x.bfloat16()))
    with pytest.raises(TypeError, match=f"^{name}"):
        run(x.tolist())


def test_dtypes_without_kernels_name_those_that_have_some(good, device):
    for dtype in (torch.float64, torch.int32) + ((torch.float16,) if device == "cpu" else ()):
        same = {name: x.to(dtype) for name, x in good.items()}
        text = refused("q", lambda: tercet.nsa(**same, spec=SMALL))
        assert "float32" in text and "bfloat16" in text
    same = {name: x.to(torch.complex64) for name, x in good.items()}
    refused("q", lambda: tercet.nsa(**same, spec=SMALL))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="one device only")
@pytest.mark.parametrize("name", NAMES)
def test_devices_are_not_mixed(good, device, name):
    other = {"cpu": "cuda", "cuda": "cpu"}[device]
    moved = {**good, name: good[name].to(other)}
    with pytest.raises(ValueError) as caught:
        tercet.nsa(**moved, spec=SMALL)
    first = str(caught.value).split(":")[0]
    assert first == ("k_cmp" if name == "q" else name)


@pytest.mark.parametrize(
    "offsets",
    [[], [0], [0, T - 1], [0, T + 1], [1, T], [0, 50, 40, T], [0, -1, T], [-T, 0], [0, 2**40, T],
     [0, T + 2**32], [0.0, float(T)], [[0, T]], ["a"]],
    ids=str,
)
def test_offsets_that_lie(good, offsets):
    refused("cu_seqlens", lambda: tercet.attend(good["q"], good["k_slc"], good["v_slc"], offsets))
    refused("cu_seqlens", lambda: tercet.compress(good["k_slc"], None, offsets, SMALL))
    refused("cu_seqlens", lambda: tercet.nsa(**good, cu_seqlens=offsets, spec=SMALL))


def test_offsets_of_another_kind(good):
    for offsets in (torch.tensor([0.0, T]), torch.tensor([[0, T]]), torch.tensor(T)):
        refused("cu_seqlens", lambda: tercet.nsa(**good, cu_seqlens=offsets, spec=SMALL))
    batched = {name: x[None] for name, x in good.items()}
    refused("cu_seqlens", lambda: tercet.nsa(**batched, cu_seqlens=[0, T], spec=SMALL))


def test_offsets_that_ask_for_other_compressed_blocks(good):
    refused("k_cmp", lambda: tercet.nsa(**good, cu_seqlens=[0, 6, T], spec=SMALL))


def test_specs():
    for field, value in [
        ("compress_block", 0), ("compress_stride", 0), ("select_block", 0), ("select_count", 0),
        ("window", 0), ("compress_stride", 7), ("compress_block", 128), ("select_count", 2),
        ("select_count", 1 << 20), ("select_block", -1), ("window", 1.5), ("select_local", True),
        ("select_initial", 1 << 70), ("select_local", (1 << 63) - 1),
    ]:
        with pytest.raises(ValueError) as caught:
            tercet.Spec(**{field: value})
        assert "spec." in str(caught.value)
    with pytest.raises(TypeError, match="^spec"):
        tercet.compress(torch.randn(40, 1, 8), spec={"window": 3})


def test_scales_and_windows(good):
    for scale in (0, -1.0, float("nan"), float("inf"), 1e60, 1e-60):
        refused("scale", lambda: tercet.nsa(**good, spec=SMALL, scale=scale))
        refused("scale", lambda: tercet.attend(good["q"], good["k_slc"], good["v_slc"], scale=scale))
    for window in (0, -3, 1 << 40):
        refused("window", lambda: tercet.attend(good["q"], good["k_slc"], good["v_slc"], window=window))


def test_heads_and_dims(device):
    make = lambda heads, dim: torch.randn(5, heads, dim, device=device)
    refused("q", lambda: tercet.attend(make(3, 8), make(2, 8), make(2, 8)))
    refused("q", lambda: tercet.attend(make(2, 257), make(2, 257), make(2, 8)))
    refused("q", lambda: tercet.attend(make(2, 8), make(2, 8), make(2, 300)))
    refused("q", lambda: tercet.attend(make(2, 0), make(2, 0), make(2, 8)))
    refused("k", lambda: tercet.attend(make(2, 8), make(2, 9), make(2, 8)))
    with pytest.raises(ValueError):
        tercet.attend(make(0, 8), make(0, 8), make(0, 8))


def test_choices_that_no_selection_makes(good, device):
    choice = tercet.nsa(**good, spec=SMALL, return_indices=True)[1]
    run = lambda bad: tercet.nsa(**good, spec=SMALL, indices=bad)
    assert torch.equal(run(choice), tercet.nsa(**good, spec=SMALL, indices=choice))
    refused("indices", lambda: run(choice.long()))
    refused("indices", lambda: run(choice[:-1]))
    refused("indices", lambda: run(choice.transpose(0, 1)))
    for value in (-2, -(2**31), 2**31 - 1, 6, 1000):
        bad = choice.clone()
        bad[80, 1, 2] = value
        refused("indices", lambda: run(bad))
    twice = choice.clone()
    twice[80, 0, 1] = twice[80, 0, 2]
    refused("indices", lambda: run(twice))
    refused("indices", lambda: run(torch.full_like(choice, -1)))


def test_phi_that_does_not_fit(device):
    x = torch.randn(60, 2, 6, device=device)
    good = tercet.LinearPhi(torch.randn(2, 48, 6, device=device), torch.randn(2, 8, 6, device=device))
    tercet.compress(x, good, spec=SMALL)
    for field in good._fields:
        tensor = getattr(good, field)
        for bad in (tensor[:1], tensor[..., :-1].contiguous(), tensor.bfloat16(), tensor.transpose(0, 1)):
            refused(f"phi.{field}", lambda: tercet.compress(x, good._replace(**{field: bad}), spec=SMALL))
    with pytest.raises(TypeError, match="^phi"):
        tercet.compress(x, [good.weight, good.pe], spec=SMALL)


def test_nothing_differentiates_twice(good):
    q = good["q"].clone().requires_grad_()
    out = tercet.attend(q, good["k_slc"], good["v_slc"])
    (grad,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.sum(), q)


def test_non_finite_numbers_come_out_as_such(good):
    for value in (float("nan"), float("inf"), float("-inf")):
        for name in NAMES:
            bad = good[name].clone()
            bad[len(bad) // 2] = value
            out = tercet.nsa(**{**good, name: bad}, spec=SMALL)  # no crash, no hang
            if name in ("q", "gate"):
                rows = torch.arange(len(out), device=out.device) != len(bad) // 2
                assert torch.isfinite(out[rows]).all()
