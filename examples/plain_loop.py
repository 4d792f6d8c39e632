"""The same training loop in plain PyTorch and with Dora.

Five lines change: the import of DoraParallel, and the four that are marked below.

    torchrun --nproc-per-node 2 examples/plain_loop.py     # with Dora
    python examples/plain_loop.py --plain                  # without
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from dora import DoraParallel
from dora.spec import Plan

STEPS = 60

# Blocks 0-1 on the first device, 2-3 on the second. Usually a file made by `dora plan`.
PLAN = Plan.model_validate(
    {
        "devices": ("laptop", "jetson"),
        "stages": (
            {"index": 0, "first_block": 0, "last_block": 1, "replicas": [{"device": "laptop"}]},
            {"index": 1, "first_block": 2, "last_block": 3, "replicas": [{"device": "jetson"}]},
        ),
        "num_microbatches": 4,
    }
)


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(3)), nn.Linear(64, 10)
    )


def make_batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    images, labels = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
    images = images.float() / 16
    return [(images[i::STEPS], labels[i::STEPS]) for i in range(STEPS)]


def train_plain() -> float:
    batches = make_batches()
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for x, y in batches:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return loss.item()


def train_dora() -> float:
    torch.distributed.init_process_group("gloo")  # changed
    batches = make_batches()
    model = make_model()
    model = DoraParallel(model, PLAN, sample=batches[0][0])  # changed
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for x, y in batches:
        optimizer.zero_grad()
        loss = model.step(x, y, F.cross_entropy)  # changed
        model.clip_grad_norm_(1.0)  # changed
        optimizer.step()
    return loss.item()


if __name__ == "__main__":
    if "--plain" in sys.argv:
        print(f"plain: last loss {train_plain():.6f}")
    else:
        last = train_dora()
        if torch.distributed.get_rank() == 0:
            print(f"dora: last loss {last:.6f}")
        torch.distributed.destroy_process_group()
