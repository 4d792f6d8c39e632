"""Serves a vision transformer to a stream of camera frames, here scans of handwritten digits.

The model is built from its config and trained for a moment with the same object that serves it
then. Frames come one by one, as from a camera, and in groups that fill the pipeline.
Needs: pip install 'dora-parallel[hf]' scikit-learn

    torchrun --nproc-per-node 3 examples/serve_vit.py [--quick]
"""

import argparse
import statistics
import time

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification

from dora import DoraParallel
from dora.spec import Plan

CONFIG = ViTConfig(
    image_size=8, patch_size=2, num_channels=1, num_labels=10,
    hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128,
)  # fmt: skip
GROUP = 8

# The camera and the hub share the first layers, at 3 frames to 1; the desktop does the rest.
PLAN = Plan.model_validate(
    {
        "devices": ("camera", "hub", "desktop"),
        "stages": (
            {
                "index": 0,
                "first_block": 0,
                "last_block": 1,
                "replicas": [
                    {"device": "camera", "share": 0.25},
                    {"device": "hub", "share": 0.75},
                ],
            },
            {"index": 1, "first_block": 2, "last_block": 6, "replicas": [{"device": "desktop"}]},
        ),
        "num_microbatches": GROUP,
    }
)


def main(steps: int, num_frames: int) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images, labels = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
    images = images.float().view(-1, 1, 8, 8) / 8 - 1
    frames, answers = images[-num_frames:], labels[-num_frames:]

    model = DoraParallel(ViTForImageClassification(CONFIG), PLAN, sample=images[:GROUP])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for i in range(steps):
        batch = torch.arange(i * 64, (i + 1) * 64) % (len(images) - num_frames)
        optimizer.zero_grad()
        model.step(
            images[batch], labels[batch], lambda output, y: F.cross_entropy(output.logits, y)
        )
        optimizer.step()

    model.eval()
    with torch.no_grad():
        for frame in images[:GROUP]:  # shapes are found once per device
            model(frame[None])
    latencies_s, right = [], 0
    for frame, answer in zip(frames, answers, strict=True):
        start = time.perf_counter()
        with torch.no_grad():
            guess = model(frame[None]).logits.argmax()
        latencies_s.append(time.perf_counter() - start)
        right += int(guess == answer)

    start = time.perf_counter()
    for group in frames.split(GROUP):
        with torch.no_grad():
            model(group)
    grouped_s = time.perf_counter() - start

    if dist.get_rank() == 0:
        centiles = statistics.quantiles(latencies_s, n=20)
        print(f"frames recognised: {right} of {num_frames}, after {steps} training steps")
        print(
            f"one by one: median {centiles[9] * 1e3:.1f} ms, 95 % within {centiles[18] * 1e3:.1f}"
        )
        print(f"in groups of {GROUP}: {num_frames / grouped_s:.0f} frames/s")
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    is_quick = parser.parse_args().quick
    main(steps=5 if is_quick else 80, num_frames=24 if is_quick else 200)
