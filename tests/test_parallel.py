"""The rest of a training loop around DoraParallel behaves as around the plain module."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import Case, Cnn, make
from plans import make_plan
from ranks import outcomes, run_ranks
from safetensors import safe_open
from test_transparency import grads, plain_step, relative_error
from torch import nn

from dora import DoraParallel, partition
from dora.errors import SpecError
from dora.runtime.batch import as_call
from dora.scheduler import build_schedule
from dora.spec import Transfer

pytestmark = pytest.mark.timeout(120)


def build(case: Case, shares: Any = ((1,), (1,)), **options: Any) -> DoraParallel:
    args, kwargs = as_call(case.inputs)
    chain = partition(case.module, args, kwargs)
    fields = options.pop("plan_fields", {})
    return DoraParallel(chain, make_plan(chain.num_blocks, shares, **fields), **options)


def step(model: DoraParallel, case: Case) -> torch.Tensor:
    return model.step(case.inputs, case.targets, case.loss_fn)


# ---------------------------------------------------------------- the loop around it


def whole_loop(rank: int, shares: Any) -> float:
    """Accumulation over two batches, clipping, AdamW, warm-up and zero_grad, three times."""
    case, plain = make("gpt2"), make("gpt2")
    model = build(case, shares)
    both = []
    for module in (model, plain.module):
        # A large eps keeps rounding of almost zero gradients from flipping AdamW's steps.
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, eps=1e-3)
        both.append((optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3)))
    worst = 0.0
    for _ in range(3):
        for _ in range(2):
            step(model, case)
            plain_step(plain, 0, per_microbatch=False)
        norm = model.clip_grad_norm_(0.5)
        expected = torch.nn.utils.clip_grad_norm_(plain.module.parameters(), 0.5)
        worst = max(worst, float(abs(norm - expected) / expected))
        worst = max(worst, relative_error(grads(model), grads(plain.module)))
        for optimizer, scheduler in both:
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return max(worst, relative_error(model.state_dict(), plain.module.state_dict()))


@pytest.mark.parametrize("shares", [[[1], [1]], [[3, 1], [1]]])
def test_accumulation_clipping_scheduler_and_adamw(shares):
    assert max(run_ranks(sum(map(len, shares)), whole_loop, shares)) <= 1e-5


def with_autocast(rank: int) -> tuple[float, float]:
    case, plain = make("bert"), make("bert")
    model = build(case)
    with torch.autocast("cpu", torch.bfloat16):
        loss = step(model, case)
        expected = plain_step(plain, 0, per_microbatch=True)
    return abs(float(loss) - expected), relative_error(grads(model), grads(plain.module))


def test_autocast_bf16_is_exact():
    for loss, grad in run_ranks(2, with_autocast):
        assert loss == 0
        assert grad == 0


def with_checkpointing(rank: int) -> float:
    case, plain = make("gpt2_dropout"), make("gpt2_dropout")
    model = build(case, activation_checkpointing=True, seed=5)
    step(model, case)
    plain_step(plain, 0, per_microbatch=True)
    return relative_error(grads(model), grads(plain.module))


def test_activation_checkpointing_draws_the_same_masks():
    assert max(run_ranks(2, with_checkpointing)) <= 1e-5


def checkpointed_norm(rank: int) -> float:
    case, plain = make("cnn"), make("cnn")
    model = build(case, activation_checkpointing=True)
    step(model, case)
    plain_step(plain, 0, per_microbatch=True)
    buffers = {n: b for n, b in plain.module.named_buffers() if b.is_floating_point()}
    return relative_error(model.state_dict(), buffers)


def test_recomputed_batch_norm_counts_each_micro_batch_once():
    assert max(run_ranks(2, checkpointed_norm)) <= 1e-6


class Skip(nn.Module):
    """A small U-Net: no module list, values that skip over later layers."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep = nn.Linear(6, 8), nn.Linear(8, 8)
        self.up, self.head = nn.Linear(16, 8), nn.Linear(14, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        down = torch.relu(self.down(x))
        up = torch.relu(self.up(torch.cat([torch.relu(self.deep(down)), down], 1)))
        return self.head(torch.cat([up, x], 1))


def exported(rank: int) -> tuple[float, float, bool]:
    cases = []
    for _ in range(2):
        torch.manual_seed(0)
        cases.append(Case(Skip(), torch.randn(8, 6), torch.randint(0, 3, (8,)), F.cross_entropy))
    case, plain = cases
    chain = partition(case.module, (case.inputs,), method="export")
    model = DoraParallel(chain, make_plan(chain.num_blocks, [[1], [1, 1]]))
    step(model, case)
    plain_step(plain, 0, per_microbatch=False)
    with torch.no_grad():
        output = model(case.inputs)
    error = relative_error({"y": output}, {"y": plain.module(plain.inputs)})
    same_keys = list(model.state_dict()) == list(plain.module.state_dict())
    return relative_error(grads(model), grads(plain.module)), error, same_keys


def test_exported_model_with_skip_connections():
    for grad, output, same_keys in run_ranks(3, exported):
        assert grad <= 1e-5
        assert output <= 1e-6
        assert same_keys


def with_frozen(rank: int) -> tuple[float, list[str]]:
    case, plain = make("bert"), make("bert")
    for module in (case.module, plain.module):
        module.bert.embeddings.requires_grad_(False)
        module.bert.encoder.layer[0].requires_grad_(False)
    model = build(case, [[1, 1], [1]])
    step(model, case)
    plain_step(plain, 0, per_microbatch=False)
    expected = grads(plain.module)
    held = {n for n, p in model.named_parameters() if p.requires_grad}
    mine = grads(model)
    return relative_error(mine, expected), sorted(held ^ set(mine))


def test_frozen_blocks_get_no_gradient():
    for error, differing in run_ranks(3, with_frozen):
        assert error <= 1e-5
        assert not differing


def loss_inside(rank: int) -> tuple[float, float]:
    """The model computes its own loss from labels, as Hugging Face models do."""
    case = make("bert")
    labels = {**case.inputs, "labels": case.targets}
    model = build(case)
    expected = make("bert").module(**labels).loss
    return float(model.step(labels)), float(expected)


def test_loss_of_the_model_itself():
    for ours, plain in run_ranks(2, loss_inside):
        assert ours == pytest.approx(plain, rel=1e-5)


def summed(rank: int) -> tuple[float, float]:
    case, plain = make("mlp", 7), make("mlp", 7)  # 7 samples: micro-batches of 2, 2, 2 and 1

    def loss_fn(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(output, target, reduction="sum")

    model = build(case, loss_reduction="sum")
    loss = model.step(case.inputs, case.targets, loss_fn)
    expected = loss_fn(plain.module(plain.inputs), plain.targets)
    expected.backward()
    error = relative_error(grads(model), grads(plain.module))
    return abs(float(loss) - expected.item()) / expected.item(), error


def test_uneven_last_batch_and_summed_loss():
    for loss, grad in run_ranks(2, summed):
        assert loss <= 1e-5
        assert grad <= 1e-5


def ordered_by_the_network_scheduler(rank: int) -> float:
    """The last message of every rank goes first: a bad order, which must change nothing else."""
    case, plain = make("mlp"), make("mlp")
    model = build(case, [[1], [1], [1]])
    schedule = build_schedule(model.plan)
    transfers = tuple(
        Transfer(src=r, dst=0, num_bytes=0, action=action, priority=float(i))
        for r, actions in enumerate(schedule.actions_by_rank)
        for i, action in enumerate(actions)
        if action.kind.startswith("SEND")
    )
    fields = {"transfers": transfers}
    model = build(case, [[1], [1], [1]], plan_fields=fields)
    step(model, case)
    plain_step(plain, 0, per_microbatch=False)
    return relative_error(grads(model), grads(plain.module))


def test_order_of_transfers_does_not_change_gradients():
    assert max(run_ranks(3, ordered_by_the_network_scheduler)) <= 1e-5


def random_state_and_memory(rank: int) -> bool:
    case = make("patches_dropout")
    model = build(case)
    before = torch.get_rng_state()
    step(model, case)
    return torch.equal(before, torch.get_rng_state())


def test_step_leaves_the_users_generator_alone():
    assert all(run_ranks(2, random_state_and_memory))


def local_bytes(rank: int) -> tuple[int, int]:
    case = make("gpt2")
    total = sum(p.nbytes for p in case.module.parameters())
    model = build(case)
    real = sum(p.untyped_storage().nbytes() for p in model.module.parameters())
    return real, total


def test_each_rank_keeps_only_its_blocks():
    for real, total in run_ranks(2, local_bytes):
        assert real < 0.8 * total


# ---------------------------------------------------------------- batch norm


class Momentumless(nn.BatchNorm2d):
    """Averages over all batches so far instead of exponentially."""

    def __init__(self, width: int) -> None:
        super().__init__(width, momentum=None)


def cumulative_norm(rank: int) -> float:
    cases = []
    for _ in range(2):
        torch.manual_seed(0)
        module = Cnn(Momentumless)
        cases.append(
            Case(module, torch.randn(8, 3, 32, 32), torch.randint(0, 5, (8,)), F.cross_entropy)
        )
    case, plain = cases
    model = build(case, [[3, 1], [1]])
    for i in range(2):
        step(model, case)
        plain_step(plain, i, per_microbatch=True)
    buffers = dict(plain.module.named_buffers())
    floats = {n: b for n, b in buffers.items() if b.is_floating_point()}
    return relative_error(model.state_dict(), floats)


def test_batch_norm_without_momentum_over_uneven_replicas():
    assert max(run_ranks(3, cumulative_norm)) <= 1e-5


# ---------------------------------------------------------------- inference


def infer_many(rank: int) -> float:
    """Other batch sizes than in training, also one, over replicas; exact per sample."""
    case, plain = make("bert"), make("bert")
    model = build(case, [[1, 1], [1]]).eval()
    plain.module.eval()
    worst = 0.0
    with torch.no_grad():
        for size in (1, 1, 3, 8):
            batch = {name: value[:size] for name, value in case.inputs.items()}
            ours, expected = model(**batch).logits, plain.module(**batch).logits
            worst = max(worst, float((ours - expected).abs().max()))
    return worst


def test_inference_of_any_batch_size():
    assert max(run_ranks(3, infer_many)) <= 1e-6


def infer_to_one(rank: int) -> bool:
    case = make("mlp")
    model = build(case, outputs_to=0).eval()
    with torch.no_grad():
        return model(case.inputs) is None


def test_outputs_to_one_rank():
    assert run_ranks(2, infer_to_one) == [False, True]


# ---------------------------------------------------------------- state


def round_trip(rank: int, folder: str) -> float:
    case, plain = make("gpt2", seed=1), make("gpt2", seed=2)
    model = build(case, [[1, 1], [1]])
    model.load_state_dict(plain.module.state_dict())
    model.save(folder)
    other = build(make("gpt2", seed=3), [[1], [1, 1]])
    torch.distributed.barrier()
    other.load(folder)
    return relative_error(other.state_dict(), plain.module.state_dict())


def test_state_survives_save_and_load_under_another_plan(tmp_path):
    assert max(run_ranks(3, round_trip, str(tmp_path))) == 0
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    names = list(index["weight_map"])
    assert len(names) == len(set(names))
    assert "lm_head.weight" not in names, "a tied weight is stored once"
    stored: dict[str, torch.Tensor] = {}
    for file in set(index["weight_map"].values()):
        with safe_open(tmp_path / file, framework="pt") as opened:
            stored.update({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
    expected = make("gpt2", seed=2).module.state_dict()
    assert all(torch.equal(stored[name], expected[name]) for name in names)


def load_wrong(rank: int, folder: str) -> None:
    build(make("mlp")).load(folder)


def test_load_of_another_model_names_what_is_missing(tmp_path):
    run_ranks(2, save_only, str(tmp_path))
    for outcome in outcomes(2, load_wrong, str(tmp_path)):
        assert isinstance(outcome.error, SpecError)
        assert "is missing" in str(outcome.error)
    for outcome in outcomes(2, load_wrong, str(tmp_path / "nothing")):
        assert isinstance(outcome.error, SpecError)
        assert "given no checkpoint" in str(outcome.error)


def save_only(rank: int, folder: str) -> None:
    build(make("tied")).save(folder)


def strict_load(rank: int) -> str:
    model = build(make("mlp"))
    state = model.state_dict()
    state["other"] = state.pop("0.weight")
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        return str(error)
    return ""


def test_strict_load_names_the_keys():
    for text in run_ranks(2, strict_load):
        assert "missing ['0.weight'], unexpected ['other']" in text


# ---------------------------------------------------------------- timeline


def timed(rank: int) -> str:
    case = make("mlp")
    model = build(case, [[1, 1], [1]])
    step(model, case)
    return model.timeline().to_json()


def test_timeline_has_every_action_of_every_rank_on_one_clock():
    from dora.spec import Timeline

    one, two, three = (Timeline.from_json(text) for text in run_ranks(3, timed))
    assert one == two == three
    computed = sorted(s.label for s in one.spans if s.lane == "compute")
    assert computed == sorted(f"{s}{kind}{m}" for s in (0, 1) for kind in "FB" for m in range(4))
    start = {s.label: s.start_s for s in one.spans if s.lane == "compute"}
    end = {s.label: s.end_s for s in one.spans if s.lane == "compute"}
    for m in range(4):
        assert end[f"0F{m}"] <= start[f"1F{m}"]
        assert end[f"1B{m}"] <= start[f"0B{m}"]
    assert one.makespan_s > 0
    assert 0 <= one.bubble_ratio < 1
