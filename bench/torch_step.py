"""One training step of a small dense Llama in PyTorch on the CPU: tokens per second.

The same model, batch and optimizer as `tercet bench step` (vocab 512, width 256, 4 layers, 8 heads,
SwiGLU, RMSNorm, RoPE, T 512, batch 4, f32, AdamW, gradient clipping), written the way a PyTorch user would.
`bench/step.sh` runs both in turn. Needs `pip install torch numpy`.
"""

import argparse
import json
import statistics
import time

import torch
import torch.nn as nn
import torch.nn.functional as F


class Config:
    vocab, width, layers, heads, hidden, tokens, batch = 512, 256, 4, 8, 688, 512, 4


def rope_tables(tokens, dim, base=10000.0):
    frequencies = 1.0 / base ** (torch.arange(0, dim, 2).float() / dim)
    angles = torch.outer(torch.arange(tokens).float(), frequencies)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rope(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class Norm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return F.rms_norm(x, (x.shape[-1],), self.weight, 1e-6)


class Layer(nn.Module):
    def __init__(self, c, fused):
        super().__init__()
        self.heads, self.fused = c.heads, fused
        self.norm1, self.norm2 = Norm(c.width), Norm(c.width)
        self.q, self.k, self.v, self.o = (nn.Linear(c.width, c.width, bias=False) for _ in range(4))
        self.gate = nn.Linear(c.width, c.hidden, bias=False)
        self.up = nn.Linear(c.width, c.hidden, bias=False)
        self.down = nn.Linear(c.hidden, c.width, bias=False)

    def attention(self, x, cos, sin, mask):
        b, t, width = x.shape
        q, k, v = (
            f(x).view(b, t, self.heads, width // self.heads).transpose(1, 2)
            for f in (self.q, self.k, self.v)
        )
        q, k = rope(q, cos, sin), rope(k, cos, sin)
        if self.fused:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
            out = scores.masked_fill(mask, float("-inf")).softmax(dim=-1) @ v
        return self.o(out.transpose(1, 2).reshape(b, t, width))

    def forward(self, x, cos, sin, mask):
        x = x + self.attention(self.norm1(x), cos, sin, mask)
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Llama(nn.Module):
    def __init__(self, c, fused):
        super().__init__()
        self.embed = nn.Embedding(c.vocab, c.width)
        self.layers = nn.ModuleList(Layer(c, fused) for _ in range(c.layers))
        self.norm = Norm(c.width)
        self.head = nn.Linear(c.width, c.vocab, bias=False)
        cos, sin = rope_tables(c.tokens, c.width // c.heads)
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)
        self.register_buffer("mask", torch.ones(c.tokens, c.tokens, dtype=torch.bool).triu(1))

    def forward(self, ids, targets):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin, self.mask)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def measure(fused, steps):
    torch.manual_seed(0)
    c = Config()
    model = Llama(c, fused)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    stream = torch.randint(0, c.vocab, (c.batch, c.tokens + 1))
    ids, targets = stream[:, :-1].contiguous(), stream[:, 1:].contiguous()

    def step():
        optimizer.zero_grad(set_to_none=False)
        loss = model(ids, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    for _ in range(3):
        step()
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        loss = step()
        times.append(time.perf_counter() - start)
    parameters = sum(p.numel() for p in model.parameters())
    return {
        "framework": f"torch {torch.__version__}",
        "attention": "fused" if fused else "plain",
        "threads": torch.get_num_threads(),
        "parameters": parameters,
        "loss": loss,
        "tokens_per_second": c.batch * c.tokens / statistics.median(times),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    for fused in (False, True):
        print(json.dumps(measure(fused, args.steps)), flush=True)
