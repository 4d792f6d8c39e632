"""Trains a character model on the source of Python's standard library, on four devices.

Every process measures itself, all of them agree on the plan that is best for a step, and the loop
is an ordinary one. The model and the text are in dora/demo/charlm.py.

    torchrun --nproc-per-node 4 examples/train_charlm.py [--quick]
"""

import argparse
import math
from pathlib import Path

import torch
import torch.distributed as dist

from dora import DoraParallel
from dora.catalog import load_cluster
from dora.demo.charlm import CharLM, batches, next_char_loss, stdlib_text
from dora.search import planned
from dora.spec import QoE, Workload

BATCH_SIZE, CONTEXT = 32, 64

parser = argparse.ArgumentParser()
parser.add_argument("--quick", action="store_true")
parser.add_argument("--cluster", type=Path, default=Path(__file__).with_name("cluster.toml"))
parser.add_argument("--record", type=Path, help="folder to write what `dora report` shows to")
parser.add_argument("--checkpoint", type=Path, help="folder to save the model in")
options = parser.parse_args()
steps = 10 if options.quick else 200

dist.init_process_group("gloo")
torch.set_num_threads(1)
torch.manual_seed(0)
text = stdlib_text(max_chars=400_000 if options.quick else 4_000_000)
inputs, _ = next(batches(text.train, num_batches=1, batch_size=BATCH_SIZE, context=CONTEXT))

plan = planned(load_cluster(options.cluster), Workload(batch_size=BATCH_SIZE), QoE(step_s=30))
model = DoraParallel(CharLM(width=96, context=CONTEXT), plan, sample=inputs)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

for i, (x, y) in enumerate(
    batches(text.train, num_batches=steps, batch_size=BATCH_SIZE, context=CONTEXT)
):
    optimizer.zero_grad()
    loss = model.step(x, y, next_char_loss)
    model.clip_grad_norm_(1.0)
    optimizer.step()
    if dist.get_rank() == 0 and (i + 1) % (steps // 10) == 0:
        print(f"step {i + 1}/{steps}: loss {loss:.3f}", flush=True)

if options.record:
    plan.record(model, options.record, name="character model")
model.eval()
with torch.no_grad():
    held_out = batches(text.held_out, num_batches=4, batch_size=BATCH_SIZE, context=CONTEXT, seed=1)
    losses = [float(next_char_loss(model(x), y)) for x, y in held_out]
if options.checkpoint:
    model.save(options.checkpoint)
if dist.get_rank() == 0:
    stages = " | ".join("+".join(r.device for r in stage.replicas) for stage in model.plan.stages)
    print(f"plan: {stages}, {model.plan.num_microbatches} micro-batches")
    print(f"perplexity on held-out modules: {math.exp(sum(losses) / len(losses)):.2f}")
dist.destroy_process_group()
