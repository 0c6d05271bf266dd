"""The native module by itself: whatever it is handed, it answers with an exception."""

import ctypes

import pytest
import torch
from torch.utils.dlpack import from_dlpack, to_dlpack

from tercet import _native


def attend(q, k, v, out, lse):
    _native.attend_forward(0, 1.0, None, None, 1, [q, k, v], out, lse)


def tensors():
    shapes = [(5, 2, 8), (5, 1, 8), (5, 1, 4), (5, 2, 4)]
    return [torch.randn(s) for s in shapes] + [torch.zeros(5, 2, dtype=torch.float64)]


def test_results_are_written_in_place_and_nothing_is_consumed():
    q, k, v, out, lse = tensors()
    capsules = [to_dlpack(x) for x in (q, k, v, out, lse)]
    attend(*capsules)
    first = out.clone()
    assert torch.equal(out[0], v[0].expand(2, -1))
    out.zero_()
    attend(*capsules)  # the same capsules again
    assert torch.equal(out, first)
    assert from_dlpack(capsules[0]).data_ptr() == q.data_ptr()
    with pytest.raises(ValueError, match="^q"):
        attend(*capsules)  # consumed by PyTorch just now


def test_capsules_of_dlpack_1_are_read():
    numpy = pytest.importorskip("numpy")
    q, k, v, out, lse = tensors()
    if int(numpy.__version__.split(".")[0]) < 2:
        pytest.skip("an older numpy")
    array = q.numpy().__dlpack__(max_version=(1, 0))
    attend(array, *(to_dlpack(x) for x in (k, v, out, lse)))
    assert torch.equal(out[0], v[0].expand(2, -1))
    fixed = out.numpy()
    fixed.flags.writeable = False
    with pytest.raises(ValueError, match="^out: read-only"):
        attend(*(to_dlpack(x) for x in (q, k, v)), fixed.__dlpack__(max_version=(1, 0)), to_dlpack(lse))


@pytest.mark.parametrize("place", range(5))
def test_what_is_no_capsule(place):
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    name = ctypes.c_char_p(b"something else")
    foreign = new(ctypes.addressof(name), name, None)
    for bad in (None, 3, "q", torch.zeros(3), foreign):
        capsules = [to_dlpack(x) for x in tensors()]
        capsules[place] = bad
        with pytest.raises((ValueError, TypeError)):
            attend(*capsules)


@pytest.mark.parametrize("place", range(5))
def test_outputs_and_inputs_of_another_shape_or_type(place):
    good = tensors()
    for change in (
        lambda x: x[:-1].contiguous(),
        lambda x: x.to(torch.int8),
        lambda x: x.to(torch.float16),
        lambda x: x.reshape(-1),
        lambda x: x.expand(3, *x.shape),
        lambda x: x.flip(0).as_strided(x.shape, [0] * x.dim()),
    ):
        changed = list(good)
        changed[place] = change(good[place])
        with pytest.raises(ValueError):
            attend(*(to_dlpack(x) for x in changed))


def test_numbers_out_of_range():
    spec = [32, 16, 64, 16, 1, 2, 512]
    assert _native.compressed_blocks(spec, None, 2, 200) == 10
    for bad in (
        lambda: _native.compressed_blocks(spec, None, 3, 200),
        lambda: _native.compressed_blocks(spec, None, 0, 200),
        lambda: _native.compressed_blocks(spec, None, 1, 2**40),
        lambda: _native.compressed_blocks(spec[:-1], None, 1, 200),
        lambda: _native.compressed_blocks([-1, *spec[1:]], None, 1, 200),
        lambda: _native.compressed_blocks([2**64, *spec[1:]], None, 1, 200),
        lambda: _native.CompressTail(spec, 0, 8, False),
        lambda: _native.NsaCache(spec, [8, 3, 16, 16]),
        lambda: _native.DenseCache([8, 2, 16, 16], 0),
    ):
        with pytest.raises((ValueError, OverflowError)):
            bad()


def test_a_device_that_is_not_there():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(RuntimeError):
        _native.CudaNsaCache(0, 0, [32, 16, 64, 16, 1, 2, 512], [8, 2, 16, 16], "float32", 1, 0)
    assert _native.memory(0) == (0, 0, 0)
