"""Trains a character model for a moment, then writes Python with it, on two devices.

What makes a model able to generate is `cache`: its forward takes one, and each attention hands it
the keys and values of the new characters and gets those of all. The text is the source of Python's
standard library; nothing is downloaded.

    torchrun --nproc-per-node 2 examples/generate_lm.py [--quick]
"""

import argparse
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from dora import DoraParallel
from dora.demo.charlm import ALPHABET, batches, decode, encode, next_char_loss, stdlib_text
from dora.spec import Plan

WIDTH, LAYERS, HEADS, CONTEXT = 96, 4, 4, 160
PROMPTS = (
    "def ",
    "import ",
    "class ",
    "    return ",
    "if __name__",
    "    for i in ",
    "# ",
    "try:\n",
)

# The embeddings and two layers on the first device, the rest on the second.
PLAN = Plan.model_validate(
    {
        "devices": ("laptop", "jetson"),
        "stages": (
            {"index": 0, "first_block": 0, "last_block": 2, "replicas": [{"device": "laptop"}]},
            {"index": 1, "first_block": 3, "last_block": 6, "replicas": [{"device": "jetson"}]},
        ),
        "num_microbatches": 4,
    }
)


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.merge = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x, cache=None):
        heads = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        q, k, v = (h.unflatten(-1, (HEADS, -1)).transpose(1, 2) for h in heads)
        if cache is None:
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            k, v = cache.update(k, v, self)
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=cache.mask)
        x = x + self.merge(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class WritingLM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.characters = nn.Embedding(len(ALPHABET), WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        self.layers = nn.ModuleList(Layer(WIDTH) for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, len(ALPHABET), bias=False)

    def forward(self, text, cache=None):
        places = torch.arange(text.shape[1]) if cache is None else cache.positions
        x = self.characters(text) + self.positions(places)
        for layer in self.layers:
            x = layer(x, cache=cache)
        return self.head(self.norm(x))


def plain_greedy(module: nn.Module, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            tokens.append(int(module(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


def main(steps: int, num_chars: int) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    text = stdlib_text(max_chars=400_000 if steps < 100 else 4_000_000)
    batch = {"batch_size": 16, "context": CONTEXT}
    sample, _ = next(batches(text.train, num_batches=1, **batch))

    model = DoraParallel(WritingLM(), PLAN, sample=sample)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for i, (x, y) in enumerate(batches(text.train, num_batches=steps, **batch)):
        optimizer.zero_grad()
        loss = model.step(x, y, next_char_loss)
        optimizer.step()
        if dist.get_rank() == 0 and (i + 1) % (steps // 5) == 0:
            print(f"step {i + 1}/{steps}: loss {loss:.3f}", flush=True)

    model.eval()
    prompts = [encode(prompt).tolist() for prompt in PROMPTS]
    model.generate(prompts, 2)  # shapes are found once per device
    start = time.perf_counter()
    likeliest = model.generate(prompts, num_chars)
    greedy_s = time.perf_counter() - start
    drawn = model.generate(prompts, num_chars, temperature=0.8, top_k=12, seed=1)

    plain = WritingLM().eval()
    plain.load_state_dict(model.state_dict())
    if dist.get_rank() == 0:
        for prompt, generated in zip(PROMPTS, drawn, strict=True):
            print(f"--- {prompt}\n{prompt}{decode(torch.tensor(generated.tokens))}")
        ttft_s = sum(g.ttft_s for g in likeliest) / len(likeliest)
        tpot_s = sum(g.tpot_s for g in likeliest) / len(likeliest)
        print(
            f"{len(PROMPTS)} requests at a time: {len(PROMPTS) * num_chars / greedy_s:.0f} chars/s"
        )
        print(f"first after {ttft_s * 1e3:.1f} ms, then one per {tpot_s * 1e3:.1f} ms")
        expected = [plain_greedy(plain, prompt, num_chars) for prompt in prompts]
        print(f"as the plain model: {expected == [list(g.tokens) for g in likeliest]}")
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    is_quick = parser.parse_args().quick
    main(steps=10 if is_quick else 300, num_chars=12 if is_quick else 120)
