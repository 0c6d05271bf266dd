"""Compiles a kernel with NVRTC as the library does, launches it on torch tensors, times it.

The laboratory needs a Hopper GPU, PyTorch and the `cuda-bindings` package; nothing here is part of
the library.
"""
import ctypes
import pathlib

import torch
from cuda.bindings import driver, nvrtc

ROOT = pathlib.Path(__file__).resolve().parent.parent
HEADERS = ROOT / "crates/cuda/src/device"
SWIZZLE_128B = driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B
KINDS = {int: ctypes.c_int, float: ctypes.c_float}
TYPES = {torch.float32: "REAL_F32", torch.bfloat16: "REAL_BF16", torch.float16: "REAL_F16"}


def check(result):
    """The values of a cuda-bindings call, or its error as an exception."""
    code, *values = result
    if int(code) != 0:
        raise RuntimeError(f"CUDA error {code!r}")
    return values[0] if len(values) == 1 else values


class Map:
    """A TMA tensor map over a contiguous [rows, heads, columns] tensor."""

    def __init__(self, tensor, box, swizzle=SWIZZLE_128B):
        rows, heads, columns = tensor.shape
        size = tensor.element_size()
        kind = driver.CUtensorMapDataType
        dtype = {
            torch.bfloat16: kind.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            torch.float16: kind.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
            torch.float32: kind.CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
        }[tensor.dtype]
        u64, u32 = driver.cuuint64_t, driver.cuuint32_t
        self.keep = tensor
        self.map = check(
            driver.cuTensorMapEncodeTiled(
                dtype, 3, tensor.data_ptr(),
                [u64(columns), u64(heads), u64(rows)],
                [u64(columns * size), u64(heads * columns * size)],
                [u32(b) for b in box], [u32(1)] * 3,
                driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        )

    def bytes(self):
        return b"".join(int(w).to_bytes(8, "little") for w in self.map.opaque)


def compile_cubin(path, defines, arch="sm_90a"):
    """The cubin and the compiler's log."""
    text = pathlib.Path(path).read_text().encode()
    headers = sorted(list(HEADERS.glob("*.cuh")) + list(pathlib.Path(path).parent.glob("*.cuh")))
    program = check(
        nvrtc.nvrtcCreateProgram(
            text, pathlib.Path(path).name.encode(), len(headers),
            [h.read_bytes() for h in headers], [h.name.encode() for h in headers],
        )
    )
    options = [f"-arch={arch}", "-std=c++17", "-default-device", "--ptxas-options=-v", "-lineinfo"]
    options += [f"-D{k}={v}" for k, v in defines.items()]
    code = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])[0]
    size = check(nvrtc.nvrtcGetProgramLogSize(program))
    log = b" " * size
    check(nvrtc.nvrtcGetProgramLog(program, log))
    log = log.decode(errors="replace").strip("\0 \n")
    if int(code) != 0:
        raise RuntimeError(f"{path} {defines}:\n{log}")
    size = check(nvrtc.nvrtcGetCUBINSize(program))
    cubin = b" " * size
    check(nvrtc.nvrtcGetCUBIN(program, cubin))
    return cubin, log


class Kernel:
    """One entry of a source for fixed constants."""

    def __init__(self, path, entry, defines, shared=0):
        torch.cuda.current_stream()  # the primary context
        cubin, self.log = compile_cubin(path, defines)
        self.module = check(driver.cuModuleLoadData(cubin))
        self.function = check(driver.cuModuleGetFunction(self.module, entry.encode()))
        self.shared = shared
        attribute = driver.CUfunction_attribute
        if shared > 48 * 1024:
            name = attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            check(driver.cuFuncSetAttribute(self.function, name, shared))
        read = lambda a: check(driver.cuFuncGetAttribute(a, self.function))
        self.registers = read(attribute.CU_FUNC_ATTRIBUTE_NUM_REGS)
        self.local = read(attribute.CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES)

    def __call__(self, grid, block, *args):
        """Tensors pass their address, `Map`s their 128 bytes, ints as i32, floats as f32; give
        ctypes values for anything else. None is a null pointer."""
        cells = []
        for a in args:
            if isinstance(a, torch.Tensor):
                cells.append(ctypes.c_uint64(a.data_ptr()))
            elif isinstance(a, Map):
                raw = (ctypes.c_uint8 * (128 + 64))()
                start = (-ctypes.addressof(raw)) % 64
                ctypes.memmove(ctypes.addressof(raw) + start, a.bytes(), 128)
                cells.append((raw, start))
            elif a is None:
                cells.append(ctypes.c_uint64(0))
            elif isinstance(a, float):
                cells.append(ctypes.c_float(a))
            elif isinstance(a, int):
                cells.append(ctypes.c_int32(a))
            else:
                cells.append(a)
        addresses = [
            ctypes.addressof(c[0]) + c[1] if isinstance(c, tuple) else ctypes.addressof(c) for c in cells
        ]
        pointers = (ctypes.c_void_p * len(cells))(*addresses)
        grid = (list(grid) + [1, 1])[:3]
        block = (list(block) + [1, 1])[:3]
        stream = torch.cuda.current_stream().cuda_stream
        check(
            driver.cuLaunchKernel(
                self.function, *grid, *block, self.shared, stream, ctypes.addressof(pointers), 0
            )
        )


_flush = None


def flush_l2():
    """Fills the L2 with other data, by reading: what a write left there would go to memory while the
    next kernel runs."""
    global _flush
    if _flush is None:
        _flush = torch.ones(64 << 20, device="cuda")
    _flush.sum()


def median_ms(run, repeats=10, warm=2):
    """Median of single runs by device events, the L2 flushed before each."""
    for _ in range(warm):
        run()
    times = []
    for _ in range(repeats):
        flush_l2()
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        run()
        b.record()
        b.synchronize()
        times.append(a.elapsed_time(b))
    return sorted(times)[len(times) // 2]


def sequences(lengths, block, stride):
    """`Sequence` of sequences.cuh for each; compressed blocks are `block` tokens every `stride`."""
    rows, token, key = [], 0, 0
    for n in lengths:
        blocks = 0 if n < block else (n - block) // stride + 1
        rows.append((token, n, 0, token, n, key, blocks, 0))
        token, key = token + n, key + blocks
    return torch.tensor(rows, dtype=torch.int32, device="cuda")


def structure(fields):
    """A C struct of ints, floats, structs and the addresses of tensors."""
    kind = lambda v: ctypes.c_uint64 if v is None or isinstance(v, torch.Tensor) else KINDS.get(type(v), type(v))
    value = lambda v: 0 if v is None else v.data_ptr() if isinstance(v, torch.Tensor) else v
    made = type("Params", (ctypes.Structure,), {"_fields_": [(n, kind(v)) for n, v in fields]})
    return made(*[value(v) for _, v in fields])
