"""Decoding over the caller's pages, and captured steps: on a GPU only."""

import pytest
import torch

import formula
import tercet
from conftest import close

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="pages are for CUDA")
SPEC = tercet.Spec(32, 16, 64, 4, 1, 2, 100)
H, K, D, V = 8, 2, 64, 64
LENGTHS = [700, 1, 333]


def whole(dtype, lengths=LENGTHS):
    """Tensors of concatenated sequences, and their output."""
    t = sum(lengths)
    shapes = [(t, H, D), *[(t, K, D), (t, K, V)] * 3, (t, H, 3)]
    q, k_raw, v_raw, k_slc, v_slc, k_win, v_win, gate = (
        torch.randn(s, device="cuda").to(dtype) for s in shapes
    )
    gate = gate.sigmoid()
    cu = torch.tensor([0, *lengths]).cumsum(0).tolist()
    k_cmp, v_cmp = (tercet.compress(x, None, cu, SPEC) for x in (k_raw, v_raw))
    out, choice = tercet.nsa(
        q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gate, cu, SPEC, return_indices=True
    )
    return cu, (q, k_raw, v_raw, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gate), out, choice


def paged(k, v, cu, page, heads_first):
    """Pages in a shuffled order, with garbage in what is not used."""
    lengths = [b - a for a, b in zip(cu, cu[1:])]
    width = max(-(-n // page) for n in lengths) + 1
    total = width * len(lengths)
    order = torch.randperm(total)
    table = torch.full((len(lengths), width), 0, dtype=torch.int32)
    pools = [torch.full((total, page, *x.shape[1:]), torch.nan, device="cuda", dtype=x.dtype) for x in (k, v)]
    at = 0
    for i, (a, n) in enumerate(zip(cu, lengths)):
        for j in range(-(-n // page)):
            table[i, j] = order[at]
            some = min(page, n - j * page)
            for pool, x in zip(pools, (k, v)):
                pool[order[at], :some] = x[a + j * page : a + j * page + some]
            at += 1
    if heads_first:
        pools = [pool.transpose(1, 2).contiguous() for pool in pools]
    return tercet.Pages(*pools, table.cuda(), False, heads_first)


def truths(tensors, cu, choice):
    """The output by the formula with these blocks, in float64 and in the tensors' own dtype."""
    q, _, _, *rest = tensors
    args = (q, *rest)
    return [
        formula.nsa(*(x.to(dtype) for x in args), cu, SPEC, indices=choice)[0]
        for dtype in (torch.float64, q.dtype)
    ]


@cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("heads_first", [False, True])
def test_pages_equal_the_whole(dtype, heads_first):
    cu, (q, _, _, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gate), _, choice = whole(dtype)
    cmp_cu = [0, *torch.tensor([SPEC.compressed_blocks(n) for n in LENGTHS]).cumsum(0).tolist()]
    cmp = paged(k_cmp, v_cmp, cmp_cu, 64, heads_first)
    slc = paged(k_slc, v_slc, cu, 128, heads_first)
    win = paged(k_win, v_win, cu, 64, heads_first)
    last = torch.tensor(cu[1:], device="cuda") - 1
    positions = torch.tensor(LENGTHS, device="cuda", dtype=torch.int32) - 1
    got, chosen = tercet.nsa_decode(
        q[last], cmp, slc, win, gate[last], positions, spec=SPEC, return_indices=True
    )
    assert torch.equal(chosen, choice[last])
    want, plain = truths((q, None, None, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gate), cu, choice)
    close("last rows", got, want[last], plain[last], dtype)
    # A chunk of the first sequence's prompt, and an idle row.
    rows = torch.tensor([650, 651, 652, 699], device="cuda")
    positions = torch.tensor([650, 651, -1, 699], device="cuda", dtype=torch.int32)
    chunk = tercet.nsa_decode(
        q[rows], cmp, slc, win, gate[rows], positions, torch.zeros(4, device="cuda", dtype=torch.int32), SPEC
    )
    some = rows[[0, 1, 3]]
    close("a chunk", chunk[[0, 1, 3]], want[some], plain[some], dtype)
    assert not chunk[2].any()
    dense = tercet.attend_decode(q[last], slc, torch.tensor(LENGTHS, device="cuda", dtype=torch.int32) - 1)
    want = formula.attend(q.double(), k_slc.double(), v_slc.double(), cu)[last]
    close("dense", dense, want, formula.attend(q, k_slc, v_slc, cu)[last], dtype)


@cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_captured_steps_equal_the_whole(dtype):
    lengths = [400, 400]
    cu, tensors, _, choice = whole(dtype, lengths)
    want, plain = (x.unflatten(0, (2, -1)) for x in truths(tensors, cu, choice))
    q, k_raw, v_raw, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gate = (
        x.unflatten(0, (2, -1)).contiguous() for x in tensors
    )
    choice = choice.unflatten(0, (2, -1))
    prompt = 300
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        cache = tercet.NsaCache(H, K, D, V, SPEC, batch=2, capacity=400)
        head = lambda x, n=prompt: x[:, :n].contiguous()
        blocks = SPEC.compressed_blocks(prompt)
        first, chosen = cache.extend(
            head(q), head(k_cmp, blocks), head(v_cmp, blocks), head(k_slc), head(v_slc), head(k_win),
            head(v_win), head(gate), return_indices=True,
        )
        close("the prompt", first, want[:, :prompt], plain[:, :prompt], dtype)
        assert torch.equal(chosen, choice[:, :prompt])
        cache.prime(head(k_raw), head(v_raw))
        now = [x[:, prompt].contiguous() for x in (q, k_raw, v_raw, k_slc, v_slc, k_win, v_win, gate)]
        positions = torch.full((2,), prompt, dtype=torch.int32, device="cuda")
        step = lambda: cache.step(positions, *now, return_indices=True)
        made = step()
        cache.advance()
        close("a step", made[0], want[:, prompt], plain[:, prompt], dtype)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            made = step()
        for t in range(prompt + 1, 400):
            for x, full in zip(now, (q, k_raw, v_raw, k_slc, v_slc, k_win, v_win, gate)):
                x.copy_(full[:, t])
            positions.fill_(t)
            graph.replay()
            cache.advance()
            assert torch.equal(made[1], choice[:, t]), t
            close(f"step {t}", made[0], want[:, t], plain[:, t], dtype)
        assert len(cache) == 400
    with pytest.raises(ValueError, match="^stream"):
        cache.step(positions, *now)
    torch.cuda.synchronize()


@cuda
def test_what_does_not_fit_is_refused():
    cu, (q, _, _, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gate), *_ = whole(torch.float32, [200])
    cmp, slc, win = (
        paged(k, v, [0, len(k)], 64, False) for k, v in ((k_cmp, v_cmp), (k_slc, v_slc), (k_win, v_win))
    )
    at = torch.tensor([199], device="cuda", dtype=torch.int32)
    good = dict(q=q[199:], cmp=cmp, slc=slc, win=win, gate=gate[199:], positions=at, spec=SPEC)
    tercet.nsa_decode(**good)
    for name, bad in {
        "q": q[199:].cpu(),
        "gate": gate[199:, :, :2].contiguous(),
        "positions": at.long(),
        "slc.k": slc._replace(k=slc.k.bfloat16()),
        "slc.v": slc._replace(v=slc.v[:-1]),
        "cmp.k": cmp._replace(k=cmp.k.transpose(0, 1)),
        "win.table": win._replace(table=win.table + 100),
        "slc.table": slc._replace(table=slc.table.long()),
    }.items():
        with pytest.raises(ValueError, match=f"^{name}"):
            tercet.nsa_decode(**{**good, name.split(".")[0]: bad})
    with pytest.raises(ValueError, match="^positions"):
        tercet.nsa_decode(**good, longest=150)
    with pytest.raises(ValueError, match="^sequences"):
        tercet.nsa_decode(**good, sequences=torch.tensor([3], device="cuda", dtype=torch.int32))
    with pytest.raises(ValueError):  # more tokens than the pages hold
        tercet.nsa_decode(**{**good, "positions": at + 10_000})
    with pytest.raises(TypeError, match="^cmp"):
        tercet.nsa_decode(**{**good, "cmp": cmp.k})


def test_pages_on_the_cpu_are_refused():
    x = torch.zeros(1, 64, K, D)
    pages = tercet.Pages(x, x)
    with pytest.raises(ValueError, match="^q: on cpu"):
        tercet.attend_decode(torch.zeros(1, H, D), pages, torch.zeros(1, dtype=torch.int32))
    with pytest.raises(TypeError, match="^pages"):
        tercet.attend_decode(torch.zeros(1, H, D), x, torch.zeros(1, dtype=torch.int32))
