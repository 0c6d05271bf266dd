"""Every test of the operators runs on the CPU and, where there is one, on a GPU."""

import pytest
import torch

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(7)


def close(name, got, want, plain, dtype):
    """No further from float64 than twice the plain formula in the same dtype.

    The floor is storage: every element of the result was rounded once, which is half a unit in
    the last place of it, and for float32 some eight roundings of the sum before.
    """
    assert got.shape == want.shape, name
    assert torch.isfinite(got).all(), name
    norm = lambda x: x.double().cpu().norm().item()
    want = want.double().cpu()
    error, allowed = norm(got.cpu() - want), 2 * norm(plain.double().cpu() - want)
    floor = (8 if dtype == torch.float32 else 0.5) * torch.finfo(dtype).eps * norm(want)
    assert error <= allowed + floor, f"{name}: error {error:.3e}, allowed {allowed:.3e} + {floor:.3e}"
