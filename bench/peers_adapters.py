"""How each implementation is called: one class each, nothing of theirs is copied.

`forward(case)` returns the whole operator from q, k, v (and gates) to its output as a function
without arguments; gradients come from autograd. `decode(case)` returns one decoding step. A peer
that cannot do something raises `Cannot` with the reason, which goes into the table.
"""

import importlib
import importlib.util
import pathlib
import sys
import types

import torch

SPEC = (32, 16, 64, 16, 1, 2, 512)  # l, d, l', n, initial, local, window


class Cannot(Exception):
    """Why a peer does not run something."""


def module(name):
    """Imports a peer; its absence is a reason, not a failure."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # whatever a foreign package does when it is imported
        raise Cannot(f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:120]}") from error


def shell(name):
    """Makes the package `name` importable without running its __init__ (which imports models)."""
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise Cannot(f"{name} is not installed")
    package = types.ModuleType(name)
    package.__path__ = list(spec.submodule_search_locations)
    package.__spec__, package.__version__ = spec, "0"
    sys.modules.setdefault(name, package)


def stand_in(name, **members):
    """A module that a peer imports and does not need here."""
    if importlib.util.find_spec(name) is None:
        made = types.ModuleType(name)
        vars(made).update(members)
        sys.modules[name] = made


# --- a window by FlashAttention: what peers without a window kernel of their own use --------------


class _TorchFlash(torch.autograd.Function):
    """FlashAttention-2 as PyTorch ships it, with a window. q [T, H, D], one sequence."""

    @staticmethod
    def forward(ctx, q, k, v, window):
        tokens = q.shape[0]
        limits = {"window_size_left": window - 1, "window_size_right": 0} if window else {}
        out, lse, seed, offset, _ = torch.ops.aten._flash_attention_forward(
            q[None], k[None], v[None], None, None, tokens, tokens, 0.0, True, False, **limits
        )
        ctx.save_for_backward(q, k, v, out, lse, seed, offset)
        ctx.limits = limits
        return out[0]

    @staticmethod
    def backward(ctx, d_out):
        q, k, v, out, lse, seed, offset = ctx.saved_tensors
        tokens = q.shape[0]
        grads = torch.ops.aten._flash_attention_backward(
            d_out[None].contiguous(), q[None], k[None], v[None], out, lse, None, None, tokens,
            tokens, 0.0, True, seed, offset, **ctx.limits,
        )
        return (*(grad[0] for grad in grads), None)


class _Flash3(torch.autograd.Function):
    """FlashAttention-3 by its registered operators."""

    @staticmethod
    def forward(ctx, q, k, v, window):
        left, right = (window - 1, 0) if window else (-1, -1)
        out, lse, *_ = torch.ops.flash_attn_3.fwd(
            q[None], k[None], v[None], softmax_scale=q.shape[-1] ** -0.5, is_causal=True,
            window_size_left=left, window_size_right=right,
        )
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.window = left, right
        return out[0]

    @staticmethod
    def backward(ctx, d_out):
        q, k, v, out, lse = ctx.saved_tensors
        left, right = ctx.window
        grads = [torch.empty_like(x[None]) for x in (q, k, v)]
        torch.ops.flash_attn_3.bwd(
            d_out[None].contiguous(), q[None], k[None], v[None], out, lse, *grads,
            softmax_scale=q.shape[-1] ** -0.5, is_causal=True, window_size_left=left,
            window_size_right=right,
        )
        return (*(grad[0] for grad in grads), None)


def load_flash3():
    """Registers `torch.ops.flash_attn_3`, from a package or from an extension on the path."""
    if hasattr(torch.ops.flash_attn_3, "fwd"):
        return
    for name in ("flash_attn_interface", "flash_attn_3._C"):
        try:
            importlib.import_module(name)
        except Exception:
            continue
        if hasattr(torch.ops.flash_attn_3, "fwd"):
            return
    for folder in sys.path:
        for file in sorted(pathlib.Path(folder).glob("flash_attn_3/_C*.so")):
            try:
                torch.ops.load_library(str(file))
                return
            except OSError as error:
                raise Cannot(f"FlashAttention-3: {str(error)[:140]}") from error
    raise Cannot("FlashAttention-3 (flash_attn_interface) is not installed")


def window_branch(q, k, v, window):
    """The window branch for peers that bring none: FlashAttention-3 where it is there, else -2."""
    try:
        load_flash3()
        return _Flash3.apply(q, k, v, window)
    except (Cannot, RuntimeError, NotImplementedError):
        if q.shape[-1] != v.shape[-1]:
            raise Cannot("no window kernel for unequal head dims") from None
        return _TorchFlash.apply(q, k, v, window)


def heads_first(cache):
    """[B, n, K, dim] as [B, K, n, dim]."""
    return cache.transpose(1, 2).contiguous()


# --- dense attention ------------------------------------------------------------------------------


class Dense:
    """What all dense kernels have in common."""

    kind = "dense"
    spec = None
    does = ("training", "decoding")

    def load(self):
        pass


class Sdpa(Dense):
    """PyTorch's scaled_dot_product_attention by one of its backends."""

    def __init__(self, backend):
        self.backend = backend
        self.name = {"CUDNN_ATTENTION": "cuDNN (SDPA)", "FLASH_ATTENTION": "FlashAttention-2 (SDPA)"}[
            backend
        ]

    def call(self, q, k, v, causal):
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(getattr(SDPBackend, self.backend)):
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=causal, enable_gqa=True
            )

    def forward(self, case):
        def run():
            q, k, v = (x[None].transpose(1, 2) for x in (case.q, case.k, case.v))
            return self.call(q, k, v, True)[0].transpose(0, 1)

        return run

    def decode(self, case):
        q = case.q1.unsqueeze(2)
        k, v = case.k_cache.transpose(1, 2), case.v_cache.transpose(1, 2)
        return lambda: self.call(q, k, v, False).squeeze(2)


class FlashAttention3(Dense):
    name = "FlashAttention-3"

    def load(self):
        load_flash3()

    def forward(self, case):
        return lambda: _Flash3.apply(case.q, case.k, case.v, None)

    def decode(self, case):
        q, lengths = case.q1.unsqueeze(1), case.lengths
        fwd = torch.ops.flash_attn_3.fwd
        # As flash_attn_with_kvcache does: cached lengths as seqused_k, splits by its heuristic.
        plan = torch.ops.flash_attn_3.get_scheduler_metadata(
            case.batch, 1, case.tokens, case.heads, case.kv_heads, case.key_dim, case.value_dim,
            q.dtype, lengths, is_causal=True,
        )
        return lambda: fwd(
            q, case.k_cache, case.v_cache, seqused_k=lengths, is_causal=True,
            softmax_scale=case.key_dim**-0.5, scheduler_metadata=plan,
        )[0].squeeze(1)


class FlashAttention2(Dense):
    name = "flash_attn"

    def load(self):
        self.library = module("flash_attn")

    def forward(self, case):
        def run():
            q, k, v = (x[None] for x in (case.q, case.k, case.v))
            return self.library.flash_attn_func(q, k, v, causal=True)[0]

        return run

    def decode(self, case):
        q = case.q1.unsqueeze(1)
        return lambda: self.library.flash_attn_with_kvcache(
            q, case.k_cache, case.v_cache, cache_seqlens=case.lengths, causal=True
        ).squeeze(1)


class TercetDense(Dense):
    name = "tercet attend"

    def load(self):
        self.library = module("tercet")

    def forward(self, case):
        return lambda: self.library.attend(case.q, case.k, case.v)

    def decode(self, case):
        lib, longest = self.library, case.tokens
        pages = lib.Pages(*(heads_first(c) for c in case.caches), heads_first=True)
        positions = case.lengths - 1
        return lambda: lib.attend_decode(case.q1, pages, positions, longest=longest, check=False)


# --- native sparse attention ----------------------------------------------------------------------


class Sparse:
    """What all NSA implementations have in common."""

    kind = "nsa"
    spec = SPEC
    does = ("training", "decoding")

    def load(self):
        pass


class Tercet(Sparse):
    name = "tercet"

    def load(self):
        self.library = module("tercet")

    def forward(self, case):
        compress, nsa = self.library.compress, self.library.nsa

        def run():
            q, k, v = case.q, case.k, case.v
            return nsa(q, compress(k), compress(v), k, v, k, v, case.gate)

        return run

    def choice(self, case):
        """The blocks chosen, [T, K, S]."""
        q, k, v = (x.detach() for x in (case.q, case.k, case.v))
        compress = self.library.compress
        return self.library.nsa(
            q, compress(k), compress(v), k, v, k, v, case.gate.detach(), return_indices=True
        )[1]

    def decode(self, case):
        """Over pages that hold the new token already, as the dense kernels are called."""
        spec, pages = self.library.Spec(), self.library.Pages
        window = spec.window

        def ring(cache):
            newest = torch.arange(case.tokens - window, case.tokens, device=case.device)
            held = torch.empty_like(cache[:, :window])
            held[:, newest % window] = cache[:, newest]
            return heads_first(held)

        means = [heads_first(block_means(c, -(-case.tokens // 1024) * 64)) for c in case.caches]
        args = (
            case.q1,
            pages(*means, heads_first=True),
            pages(*(heads_first(c) for c in case.caches), heads_first=True),
            pages(*(ring(c) for c in case.caches), ring=True, heads_first=True),
            case.gate1,
            case.lengths - 1,
        )
        decode, longest = self.library.nsa_decode, case.tokens
        return lambda: decode(*args, spec=spec, longest=longest, check=False)


class TercetStep(Sparse):
    """A step of a cache: the token is appended and its block averaged as well."""

    name = "tercet step"
    does = ("decoding",)

    def load(self):
        self.library = module("tercet")

    def decode(self, case):
        if case.batch > 1:
            raise Cannot("batch 1 only: its prompt is attended to, which takes long")
        lib, last = self.library, case.tokens - 1
        cache = lib.NsaCache(
            case.heads, case.kv_heads, case.key_dim, case.value_dim, capacity=case.tokens
        )
        k, v = (c[0, :last] for c in case.caches)
        q = case.random(last, case.heads, case.key_dim)
        gate = torch.ones(last, case.heads, 3, device=case.device, dtype=case.dtype)
        cache.extend(q, lib.compress(k), lib.compress(v), k, v, k, v, gate)
        cache.prime(k, v)
        k1, v1 = (c[:, last].contiguous() for c in case.caches)
        position = case.lengths - 1
        return lambda: cache.step(position, case.q1, k1, v1, k1, v1, k1, v1, case.gate1)


def block_means(cache, rows):
    """Averages of blocks [B, rows, K, dim] from [B, T, K, dim], zeros after the last."""
    made = cache.new_zeros(cache.shape[0], rows, *cache.shape[2:])
    for i in range(cache.shape[0]):  # a sequence at a time: float32 is twice as large
        means = cache[i].float().unfold(0, SPEC[0], SPEC[1]).mean(-1)
        made[i, : means.shape[0]] = means.to(cache.dtype)
    return made


class FlashNsa(Sparse):
    name = "flash_nsa"

    def load(self):
        stand_in("pandas")
        try:
            from packaging.version import parse
        except ImportError as error:
            raise Cannot("flash_nsa needs `packaging`") from error
        stand_in("pkg_resources", parse_version=parse)
        self.library = module("flash_nsa")
        self.combine = module("flash_nsa.ops.combine").fused_sigmoid_combine

    def prepare(self, case):
        helper = self.library.NSAHelper
        helper.set_hyperparameters(*[SPEC[i] for i in (0, 1, 2, 6, 3, 4, 5)])
        helper.init_cu_seqlens(case.offsets)

    def forward(self, case):
        lib = self.library
        self.prepare(case)

        def run():
            q, k, v = case.q, case.k, case.v
            scale = case.key_dim**-0.5
            k_cmp, v_cmp = lib.mean_pooling(k), lib.mean_pooling(v)
            cmp, lse = lib.compress_attn(q, k_cmp, v_cmp, sm_scale=scale)
            top, _ = lib.slc_topk_indices(
                q, k_cmp, lse, sm_scale=scale, maybe_efficient_version=True, scale_slc_p=True
            )
            slc = lib.select_attn(q, k, v, top, sm_scale=scale)
            win = window_branch(q, k, v, SPEC[6])
            return self.combine(cmp, slc, win, case.logits)

        return run

    def decode(self, case):
        infer = module("flash_nsa.inference")
        self.library.NSAHelper.set_hyperparameters(*[SPEC[i] for i in (0, 1, 2, 6, 3, 4, 5)])
        page, device = 128, case.q1.device
        pages = -(-case.tokens // page)
        rows = (case.tokens - SPEC[0]) // SPEC[1] + 1
        cmp_pages = -(-rows // page)
        # One pool of pages: each sequence's tokens, then each sequence's compressed rows.
        def pool(cache):
            made = cache.new_zeros(case.batch * (pages + cmp_pages), page, *cache.shape[2:])
            tokens = made[: case.batch * pages].view(case.batch, pages * page, *cache.shape[2:])
            tokens[:, : case.tokens] = cache
            means = made[case.batch * pages :].view(case.batch, cmp_pages * page, *cache.shape[2:])
            means.copy_(block_means(cache, cmp_pages * page))
            return made

        k, v = pool(case.k_cache), pool(case.v_cache)
        numbers = torch.arange(case.batch * (pages + cmp_pages), device=device, dtype=torch.int32)
        table = numbers[: case.batch * pages].view(case.batch, pages)
        cmp_table = numbers[case.batch * pages :].view(case.batch, cmp_pages)
        table, cmp_table = (
            torch.nn.functional.pad(x, (0, -x.shape[1] % 8), value=-1).contiguous()
            for x in (table, cmp_table)
        )
        last = rows - 1
        slots = cmp_table[:, last // page] * page + last % page
        most = max(8192, 1 << (rows - 1).bit_length())

        def run():
            return infer.nsa_decode(
                case.q1, k, v, case.logits1, case.lengths, table, slots, cmp_table,
                fixed_y_maxlen=most, fixed_num_slc_blocks=most // 4,
                window_size=SPEC[6] - 1, sm_scale=case.key_dim**-0.5,  # one key more there
            )

        return run


class Fla(Sparse):
    name = "fla"
    does = ("training",)
    spec = (64, 64, 64, 16, 1, 2, 512)  # blocks do not overlap there

    def load(self):
        shell("fla")
        shell("fla.ops")
        self.library = module("fla.ops.nsa.parallel")

    def forward(self, case):
        if case.heads // case.kv_heads < 16:
            raise Cannot("fla needs at least 16 query heads per KV head")

        def run():
            q, k, v = (x[None] for x in (case.q, case.k, case.v))
            g_cmp, g_slc, g_win = case.gate[None].unbind(-1)
            out = self.library.parallel_nsa(
                q, k, v, g_cmp, g_slc, None, block_counts=16, block_size=64, window_size=0
            )[0]
            win = window_branch(case.q, case.k, case.v, SPEC[6])
            return torch.addcmul(out, win, g_win[0].unsqueeze(-1))

        return run


class XunhaoLai(Sparse):
    name = "native-sparse-attention-triton"

    def load(self):
        module("einops")
        ops = module("native_sparse_attention.ops")
        self.pool, self.cmp = ops.avgpool_compress, ops.compressed_attention
        self.slc = ops.topk_sparse_attention
        self.ops = ops

    def selected(self, case, q, k, v, top):
        return self.slc(q, k, v, top, SPEC[2], case.offsets)

    def forward(self, case):
        if case.key_dim != case.value_dim:
            raise Cannot("one head dim for keys and values there")

        def run():
            q, k, v, tokens = case.q, case.k, case.v, case.tokens
            k_cmp, offsets = self.pool(k, None, case.offsets, SPEC[0], SPEC[1], None)
            v_cmp, _ = self.pool(v, None, case.offsets, SPEC[0], SPEC[1], None)
            cmp, top = self.cmp(
                q, k_cmp, v_cmp, *SPEC[:4], case.offsets, offsets, tokens, k_cmp.shape[0], None,
                SPEC[4], SPEC[5],
            )
            slc = self.selected(case, q, k, v, top)
            win = window_branch(q, k, v, SPEC[6])
            g = case.gate
            return g[..., 0:1] * cmp + g[..., 1:2] * slc + g[..., 2:3] * win

        return run

    def decode(self, case):
        ops, g = self.ops, case.gate1
        rows = (case.tokens - SPEC[0]) // SPEC[1] + 1
        means = [block_means(cache, rows) for cache in case.caches]
        counts = torch.full_like(case.lengths, rows)

        def run():
            cmp, top = ops.compressed_attention_decode(
                case.q1, *means, case.lengths, counts, *SPEC[:4], SPEC[4], SPEC[5]
            )
            slc = ops.topk_sparse_attention_decode(
                case.q1, case.k_cache, case.v_cache, top, SPEC[2], case.lengths
            )
            recent = slice(case.tokens - SPEC[6], case.tokens)
            win = ops.flash_attention_decode(
                case.q1, case.k_cache[:, recent], case.v_cache[:, recent],
                case.lengths.clamp(max=SPEC[6]),
            )
            return g[..., 0:1] * cmp + g[..., 1:2] * slc + g[..., 2:3] * win

        return run


class Fsa(XunhaoLai):
    name = "FSA"
    does = ("training",)  # its decoding is a preview

    def load(self):
        module("einops")
        ops = module("nsa_ref.ops")
        self.pool, self.cmp = ops.avgpool_compress, ops.compressed_attention
        self.reference = ops.topk_sparse_attention
        self.optimised = module("fsa.ops").FSA_topk_sparse_attention

    def selected(self, case, q, k, v, top):
        # Its own module falls back to the reference kernel above eight heads per group.
        few = case.heads // case.kv_heads <= 8
        return (self.optimised if few else self.reference)(q, k, v, top, SPEC[2], case.offsets)


PEERS = [
    Tercet(),
    TercetStep(),
    TercetDense(),
    FlashAttention3(),
    Sdpa("CUDNN_ATTENTION"),
    Sdpa("FLASH_ATTENTION"),
    FlashAttention2(),
    FlashNsa(),
    Fla(),
    XunhaoLai(),
    Fsa(),
]
