"""Decode steps on torch tensors: caches, parameters, kernels compiled for a shape."""
import ctypes
import math
import multiprocessing
import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from harness import ROOT, SWIZZLE_128B, TYPES, Kernel, Map, check as driver_check, compile_cubin, driver  # noqa: E402

SOURCES = ROOT / "crates/attention/src/cuda/decode"
BANDWIDTH = 4.3e12
SPEC = dict(COMPRESS_BLOCK=32, COMPRESS_STRIDE=16, SELECT_BLOCK=64, SELECT_COUNT=16, SELECT_INITIAL=1, SELECT_LOCAL=2,
            WINDOW=512)
u64, i32, f32 = ctypes.c_uint64, ctypes.c_int32, ctypes.c_float


class CacheArg(ctypes.Structure):
    _fields_ = [("k", u64), ("v", u64), ("table", u64), ("page", i32), ("width", i32), ("interleaved", i32), ("ring", i32)]


class Params(ctypes.Structure):
    _fields_ = [("q", u64), ("gate", u64), ("out", u64), ("indices", u64), ("positions", u64), ("sequences", u64),
                ("cmp", CacheArg), ("slc", CacheArg), ("win", CacheArg), ("scratch", u64), ("rows", i32),
                ("kv_heads", i32), ("slice", i32), ("blocks", i32), ("scale", f32)]


class Target(ctypes.Structure):
    _fields_ = [("k", u64), ("v", u64), ("cache", CacheArg)]


class AppendArg(ctypes.Structure):
    _fields_ = [("targets", Target * 3), ("positions", u64), ("sequences", u64), ("kv_heads", i32), ("cmp", CacheArg),
                ("turns", u64)]


def compressed(spec, n):
    l, d = spec["COMPRESS_BLOCK"], spec["COMPRESS_STRIDE"]
    return 0 if n < l else (n - l) // d + 1


class PageMap(Map):
    """A TMA map over one of a cache's tensors: boxes of 64 columns and `tile` tokens of a head of a page."""

    def __init__(self, store, interleaved, tile):
        pages, a, b, dim = store.shape
        heads, page = (b, a) if interleaved else (a, b)
        token, head = (heads * dim, dim) if interleaved else (dim, page * dim)
        kind = driver.CUtensorMapDataType
        dtype = {torch.bfloat16: kind.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, torch.float16: kind.CU_TENSOR_MAP_DATA_TYPE_FLOAT16}[store.dtype]
        wide, narrow = driver.cuuint64_t, driver.cuuint32_t
        self.keep = store
        self.map = driver_check(driver.cuTensorMapEncodeTiled(
            dtype, 4, store.data_ptr(), [wide(x) for x in (dim, page, heads, pages)],
            [wide(x * 2) for x in (token, head, heads * page * dim)], [narrow(x) for x in (64, tile, 1, 1)], [narrow(1)] * 4,
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE, SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE))


class Cache:
    """Pages of [K, page, dim] or [page, K, dim]; `pages` a sequence, shuffled; or one ring each."""

    def __init__(self, sequences, capacity, kv, d, v, dtype, page=None, interleaved=False, ring=False, fill=math.nan):
        self.page = page or -(-capacity // 64) * 64
        self.width = 1 if page is None else -(-capacity // page)
        self.kv, self.interleaved, self.ring = kv, interleaved, ring
        count = sequences * self.width
        shape = lambda x: (count, self.page, kv, x) if interleaved else (count, kv, self.page, x)
        self.k = torch.full(shape(d), fill, device="cuda", dtype=dtype) if fill is not None else torch.empty(shape(d), device="cuda", dtype=dtype).normal_()
        self.v = torch.full(shape(v), fill, device="cuda", dtype=dtype) if fill is not None else torch.empty(shape(v), device="cuda", dtype=dtype).normal_()
        self.table = None
        if page is not None:
            self.table = torch.randperm(count, device="cuda").to(torch.int32).reshape(sequences, self.width).contiguous()

    def place(self, sequence, tokens):
        slot = tokens % self.page if self.ring else tokens
        page = slot // self.page
        at = self.table[sequence][page].long() if self.table is not None else torch.full_like(slot, sequence)
        return at, slot % self.page

    def put(self, sequence, tokens, k, v):
        at, slot = self.place(sequence, tokens)
        for store, x in ((self.k, k), (self.v, v)):
            if self.interleaved:
                store[at, slot] = x
            else:
                store[at, :, slot] = x

    def get(self, sequence, tokens):
        at, slot = self.place(sequence, tokens)
        return tuple(s[at, slot] if self.interleaved else s[at, :, slot] for s in (self.k, self.v))

    def maps(self, tile):
        return [PageMap(x, self.interleaved, tile) for x in (self.k, self.v)]

    def arg(self):
        table = 0 if self.table is None else self.table.data_ptr()
        return CacheArg(self.k.data_ptr(), self.v.data_ptr(), table, self.page, self.width, self.interleaved, self.ring)


NONE = CacheArg(0, 0, 0, 1, 0, 0, 0)


class Compiled(Kernel):
    """A kernel whose cubin is there already."""

    def __init__(self, cubin, entry):
        torch.cuda.current_stream()
        self.module = driver_check(driver.cuModuleLoadData(cubin))
        self.function = driver_check(driver.cuModuleGetFunction(self.module, entry.encode()))
        attribute = driver.CUfunction_attribute
        read = lambda a: driver_check(driver.cuFuncGetAttribute(a, self.function))
        self.registers = read(attribute.CU_FUNC_ATTRIBUTE_NUM_REGS)
        self.local = read(attribute.CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES)
        self.static = read(attribute.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)
        self.shared = self.allowed = 0
        driver_check(driver.cuFuncSetAttribute(self.function, attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100))
        driver_check(driver.cuFuncSetAttribute(self.function, attribute.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1))

    def allow(self, shared):
        if shared > self.allowed:
            name = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            driver_check(driver.cuFuncSetAttribute(self.function, name, shared))
            self.allowed = shared
        self.shared = shared


def compile_one(key):
    name, _, defines = key
    try:
        return compile_cubin(SOURCES / name, dict(defines))[0]
    except RuntimeError as e:
        return str(e)


def compile_all(steps):
    """Compiles what the steps need, in processes that never touch the device."""
    keys = sorted({step.key for step in steps} - Step.kernels.keys(), key=str)
    with multiprocessing.get_context("fork").Pool() as pool:
        Step.kernels.update(zip(keys, pool.map(compile_one, keys, chunksize=1)))


class Step:
    """`step.cu` (or `plain.cu`) for one shape."""

    kernels = {}

    def __init__(self, spec, heads, kv, d, v, dtype, longest, splits=4, slots=4, tile=32, choosers=64, resident=2,
                 logits_global=False, plain=False, dense=False, once=False, importance_global=False):
        group = heads // kv
        self.spec, self.plain, self.dense, self.kv, self.d = spec, plain, dense, kv, d
        self.heads, self.v = heads, v
        tiles = -(-group // 16)
        self.cluster = splits * tiles
        n = compressed(spec, longest)
        self.blocks = -(-longest // spec["SELECT_BLOCK"])
        defines = {TYPES[dtype]: 1, "GROUP": group, "D": d, "V": v, **spec}
        if dense:
            defines["DENSE"] = 1
        if plain:
            self.slice = longest if dense else max(n, spec["SELECT_COUNT"] * spec["SELECT_BLOCK"], min(spec["WINDOW"], longest))
            self.scratch_row = self.slice if dense else 2 * self.slice + self.blocks + spec["SELECT_COUNT"] + group * v
            self.threads, shared, name, entry = 256, 0, "plain.cu", "decode_plain"
        else:
            per = -(-(-(-n // tile)) // splits) * tile
            self.slice = per
            rows = 1 if logits_global else 16
            panels = max(-(-d // 64), -(-v // 64))
            shared = slots * tile * 128 * panels
            branches = 1 if dense else 3
            if splits > 1:
                shared += 16 * branches * v * 4
            if not dense:
                shared += 4 * (0 if importance_global else tiles * per * splits)
                shared += 4 * (-(-self.blocks // 4) * 4 + (0 if logits_global else 16 * (per + 8)))
            self.scratch_row = 16 * (per + 8) * self.cluster if logits_global else 0
            self.threads, name, entry = 160 + (0 if dense else choosers), "step.cu", "decode_step"
            defines |= dict(SPLITS=splits, SLOTS=slots, TILE=tile, CHOOSERS=choosers, RESIDENT=resident)
            if importance_global:
                defines["IMPORTANCE_GLOBAL"] = defines["LOGITS_GLOBAL"] = 1
                self.scratch_row = 16 * (per + 8) * self.cluster + tiles * per * splits
            if once:
                defines["READ_ONCE"] = 1
            if logits_global:
                defines["LOGITS_GLOBAL"] = 1
        self.tile = tile
        self.key = (name, entry, tuple(sorted(defines.items())))
        self.shared = shared

    @property
    def kernel(self):
        kernel = Step.kernels.get(self.key) or compile_one(self.key)
        if isinstance(kernel, bytes):
            kernel = Compiled(kernel, self.key[1])
        Step.kernels[self.key] = kernel
        if isinstance(kernel, str):
            raise RuntimeError(kernel)
        return kernel

    def bind(self, q, gate, out, positions, cmp, slc, win, indices=None, sequences=None):
        rows = q.shape[0]
        address = lambda x: 0 if x is None else x.data_ptr()
        arg = lambda c: NONE if c is None else c.arg()
        scratch = torch.empty(max(rows * self.kv * self.scratch_row, 1), device="cuda") if self.scratch_row else None
        params = Params(address(q), address(gate), address(out), address(indices), address(positions), address(sequences),
                        arg(cmp), arg(slc), arg(win), address(scratch), rows, self.kv, self.slice, self.blocks,
                        1 / math.sqrt(self.d))
        grid = (rows * self.kv * (1 if self.plain else self.cluster),)
        kernel = self.kernel
        maps = []
        if not self.plain:
            for cache in (cmp, slc, win):
                maps += (cache or slc).maps(self.tile)
        keep = (q, gate, out, positions, cmp, slc, win, indices, sequences, scratch)

        def run():
            kernel.allow(self.shared)
            kernel(grid, (self.threads,), *maps, params)
            return keep

        return run
