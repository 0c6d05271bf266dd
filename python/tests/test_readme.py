"""The README's example, run as it stands."""

import pathlib
import re
import types

import torch
from torch import nn

import tercet

README = pathlib.Path(__file__).parent.parent / "README.md"


def example():
    code = re.search(r"```python\n(.*?)```", README.read_text(), re.S).group(1)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    return names["NsaAttention"], code


def test_the_example_takes_the_place_of_a_llama_attention():
    attention, code = example()
    body = code.split("class NsaAttention")[1]
    assert len([line for line in body.splitlines() if line.strip()]) <= 30
    width, heads, kv_heads, dim = 64, 8, 2, 16
    old = types.SimpleNamespace(
        head_dim=dim,
        q_proj=nn.Linear(width, heads * dim, bias=False),
        k_proj=nn.Linear(width, kv_heads * dim, bias=False),
        v_proj=nn.Linear(width, kv_heads * dim, bias=False),
        o_proj=nn.Linear(heads * dim, width, bias=False),
    )
    new = attention(old, tercet.Spec(8, 4, 16, 4, 1, 2, 24))
    angles = torch.arange(100)[:, None] / 10000 ** (torch.arange(dim // 2) * 2 / dim)
    cos, sin = (f(torch.cat([angles, angles], -1)).expand(3, -1, -1) for f in (torch.cos, torch.sin))
    x = torch.randn(3, 100, width, requires_grad=True)
    out, weights = new(x, position_embeddings=(cos, sin), attention_mask=None)
    assert out.shape == x.shape and weights is None
    out.square().mean().backward()
    for name, parameter in new.named_parameters():
        assert torch.isfinite(parameter.grad).all() and parameter.grad.any(), name
    # Causal: a later token changes nothing before it.
    changed = x.detach().clone()
    changed[:, 70] += 1
    again = new(changed, position_embeddings=(cos, sin))[0]
    assert torch.equal(again[:, :70], out.detach()[:, :70])
    assert not torch.equal(again[:, 70:], out.detach()[:, 70:])
