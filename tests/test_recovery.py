"""A device that is lost, hangs or leaves costs the optimizer steps that are said, and no more."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from models import make
from plans import make_plan
from ranks import Outcome, outcomes
from safetensors.torch import load_file

from dora import DoraParallel, partition
from dora.errors import InfeasiblePlanError, PeerLostError
from dora.runtime.batch import as_call
from dora.runtime.replan import is_without, plan_without
from dora.runtime.snapshot import Version, keepers
from dora.runtime.verdict import Report, Store, decide

pytestmark = pytest.mark.timeout(120)

STEPS = 9


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def batch(i: int, name: str = "mlp") -> tuple[Any, torch.Tensor]:
    case = make(name, seed=100 + i)
    return case.inputs, case.targets


def build(name: str = "mlp", shares: Any = ((1,), (1,), (1,)), **options: Any) -> Any:
    case = make(name)
    chain = partition(case.module, *as_call(case.inputs))
    plan = make_plan(chain.num_blocks, shares, idle=options.pop("idle", 0))
    options = {"snapshot_interval": 1, "timeout_s": 10.0, "seed": 5, **options}
    return case, DoraParallel(chain, plan, **options)


def arm(model: DoraParallel, where: str, action: Any) -> None:
    """Makes the first unit of this rank's stage fail in its next forward or backward."""
    placed = model.plan.placement(model.rank)
    stage = model.plan.stages[placed[0] if placed else 0]
    position = model.chain.units(stage.first_block, stage.last_block)[0]
    unit = model.module.get_submodule(model.chain.calls[position])
    if where == "forward":
        unit.register_forward_pre_hook(lambda *_: action())
    elif where == "backward":
        unit.register_forward_hook(
            lambda m, i, output: output.register_hook(lambda g: action()) and None
        )


def lose(
    rank: int, victims: dict[int, tuple[int, str]], options: dict[str, Any], action: str = "die"
) -> dict[str, Any]:
    """Trains; victim -> (step, where) is lost there."""
    case, model = build(**options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-3)
    losses = []
    for i in range(STEPS):
        at, where = victims.get(rank, (-1, ""))
        if at == i:
            arm(model, where, globals()[action])
        optimizer.zero_grad()
        losses.append(float(model.step(*batch(i), case.loss_fn)))
        if at == i and where == "between":
            die()
        model.clip_grad_norm_(5.0)
        optimizer.step()
    facts = {"losses": losses, "events": list(model.events), "state": model.state_dict()}
    model.close()
    return facts


def plain(applied: list[int]) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Trains the plain module with those batches, one step each."""
    case = make("mlp")
    optimizer = torch.optim.AdamW(case.module.parameters(), lr=0.01, eps=1e-3)
    losses = []
    for i in applied:
        inputs, targets = batch(i)
        optimizer.zero_grad()
        loss = case.loss_fn(case.module(inputs), targets)
        loss.backward()
        losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(case.module.parameters(), 5.0)
        optimizer.step()
    return losses, case.module.state_dict()


def check_goes_on(results: list[Outcome], victims: set[int], *, at_most: int) -> None:
    """Compares survivors with a plain run in which the lost steps never were."""
    survivors = [r for r in range(len(results)) if r not in victims]
    for rank in survivors:
        assert results[rank].error is None, f"rank {rank}: {results[rank].trace}"
    facts = [results[rank].value for rank in survivors]
    applied: list[int] = []
    resumed = 0
    for event in facts[0]["events"]:
        if event.kind != "snapshot":
            assert event.lost_steps <= event.lost_calls <= at_most
            applied += range(resumed, event.call)
            del applied[len(applied) - event.lost_calls :]
            resumed = event.call
    before, after = applied, list(range(resumed, STEPS))
    losses, state = plain(before + after)
    for fact in facts:
        assert len(fact["losses"]) == STEPS
        assert fact["losses"] == facts[0]["losses"]
        assert [e.lost_steps for e in fact["events"]] == [e.lost_steps for e in facts[0]["events"]]
        assert fact["losses"][resumed:] == pytest.approx(losses[len(before) :], rel=1e-4)
        for name, value in state.items():
            torch.testing.assert_close(fact["state"][name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("victim", "where"),
    [
        (1, "backward"),
        (0, "between"),
        pytest.param(1, "forward", marks=pytest.mark.slow),
        pytest.param(1, "between", marks=pytest.mark.slow),
        pytest.param(0, "forward", marks=pytest.mark.slow),
        pytest.param(0, "backward", marks=pytest.mark.slow),
        pytest.param(2, "forward", marks=pytest.mark.slow),
        pytest.param(2, "backward", marks=pytest.mark.slow),
        pytest.param(2, "between", marks=pytest.mark.slow),
    ],
)
def test_training_goes_on_from_the_last_complete_step(victim, where):
    results = outcomes(3, lose, {victim: (4, where)}, {})
    assert results[victim].exitcode == -signal.SIGKILL
    check_goes_on(results, {victim}, at_most=2)


@pytest.mark.slow
def test_idle_device_takes_over():
    results = outcomes(4, lose, {1: (4, "forward")}, {"idle": 1})
    check_goes_on(results, {1}, at_most=2)


@pytest.mark.slow
def test_replicas_need_no_snapshot():
    options = {"shares": ((1, 1), (1,)), "snapshot_interval": 0}
    results = outcomes(3, lose, {1: (4, "backward")}, options)
    check_goes_on(results, {1}, at_most=0)


@pytest.mark.slow
def test_one_loss_after_the_other():
    victims = {1: (3, "forward"), 3: (6, "backward")}
    results = outcomes(4, lose, victims, {"shares": ((1,), (1,), (1,), (1,))})
    check_goes_on(results, {1, 3}, at_most=2)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_one_of_two_goes_on_alone(victim):
    check_goes_on(
        outcomes(2, lose, {victim: (4, "backward")}, {"shares": ((1,), (1,))}), {victim}, at_most=2
    )


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_silent_device_is_left_behind(victim):
    """It keeps its connections; only its answers are missing."""
    options = {"timeout_s": 3.0}
    results = outcomes(3, lose, {victim: (4, "forward")}, options, "stop", timeout_s=25)
    check_goes_on(results, {victim}, at_most=2)


def hang_and_return(rank: int) -> dict[str, Any]:
    """Rank 1 sleeps in its block for longer than the others wait, and comes back."""
    return lose(rank, {1: (4, "forward")}, {"timeout_s": 2.0}, "doze")


def doze() -> None:
    time.sleep(9)


@pytest.mark.slow
def test_device_that_comes_back_late_is_told():
    results = outcomes(3, hang_and_return, timeout_s=40)
    check_goes_on(results, {1}, at_most=2)
    assert isinstance(results[1].error, PeerLostError)
    assert "the others go on without this rank" in str(results[1].error)


# ------------------------------------------------------------ rendezvous on a rank that dies


def lose_host(rank: int, path: str, port: int) -> dict[str, Any]:
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=3,
        timeout=timedelta(seconds=30),
    )
    return lose(rank, {0: (4, "forward")}, {})


@pytest.mark.slow
def test_host_of_the_rendezvous_may_die():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    check_goes_on(outcomes(3, lose_host, port, backend=None), {0}, at_most=2)


@pytest.mark.slow
def test_shared_connections_survive_too():
    """The default process group is the engine's as well."""
    results = outcomes(3, lose, {1: (4, "backward")}, {}, backend="dora")
    check_goes_on(results, {1}, at_most=2)


# ------------------------------------------------------------ without enough left


def lose_too_much(rank: int, options: dict[str, Any]) -> None:
    lose(rank, {1: (4, "forward")}, options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"snapshot_interval": 0}, "no snapshot was taken; set snapshot_interval"),
        pytest.param(
            {"memory_limit_bytes": 2600}, "does not fit the memory", marks=pytest.mark.slow
        ),
    ],
)
def test_what_is_left_is_written_if_it_is_not_enough(tmp_path, options, message):
    results = outcomes(3, lose_too_much, {"rescue_dir": str(tmp_path), **options})
    for rank in (0, 2):
        assert isinstance(results[rank].error, PeerLostError), results[rank]
        assert message in str(results[rank].error)
        assert f"rank-{rank}.safetensors" in str(results[rank].error)
    first, last = (load_file(tmp_path / f"rank-{rank}.safetensors") for rank in (0, 2))
    assert {"0.weight", "state.exp_avg/0.weight"} <= set(first)
    assert "8.weight" in last
    whole = {name for name, _ in make("mlp").module.named_parameters()}
    saved = {name for name in {*first, *last} if "/" not in name}
    assert saved == whole if "memory_limit_bytes" in options else saved < whole


# ------------------------------------------------------------ inference


def serve(rank: int, victim: int, where_from: int, outputs_to: Any) -> dict[str, Any]:
    case, model = build(outputs_to=outputs_to)
    model.eval()
    requests = 0
    answers = []
    with torch.no_grad():
        for i in range(12):
            if rank == victim and i == where_from:
                arm(model, "forward", die)
            requests += 1
            answers.append(model(batch(i)[0]))
    model.state_dict()  # until then ranks may be some requests apart
    facts = {"answers": answers, "events": list(model.events), "requests": requests}
    model.close()
    return facts


@pytest.mark.parametrize(
    ("victim", "outputs_to"),
    [
        (1, "all"),
        pytest.param(0, 2, marks=pytest.mark.slow),
        pytest.param(2, 0, marks=pytest.mark.slow),
        pytest.param(1, 2, marks=pytest.mark.slow),
    ],
)
def test_requests_are_answered_once(victim, outputs_to):
    results = outcomes(3, serve, victim, 6, outputs_to)
    case = make("mlp")
    with torch.no_grad():
        wanted = [case.module(batch(i)[0]) for i in range(12)]
    for rank, result in enumerate(results):
        if rank == victim:
            continue
        assert result.error is None, result.trace
        assert result.value["requests"] == len(result.value["answers"]) == 12
        assert [e.lost_steps for e in result.value["events"]] == [0]
        for answer, expected in zip(result.value["answers"], wanted, strict=True):
            if outputs_to in ("all", rank):
                torch.testing.assert_close(answer, expected)
            else:
                assert answer is None


# ------------------------------------------------------------ leaving


def depart(rank: int, leaver: int, idle: int) -> dict[str, Any] | None:
    case, model = build(idle=idle, snapshot_interval=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-3)
    losses = []
    for i in range(STEPS):
        if rank == leaver and i == 4:
            model.leave()
            with pytest.raises(Exception, match="this device has left"):
                model.step(*batch(i), case.loss_fn)
            return None
        optimizer.zero_grad()
        losses.append(float(model.step(*batch(i), case.loss_fn)))
        model.clip_grad_norm_(5.0)
        optimizer.step()
    facts = {"losses": losses, "events": list(model.events), "state": model.state_dict()}
    model.close()
    return facts


@pytest.mark.parametrize(("leaver", "idle"), [(1, 0), pytest.param(0, 1, marks=pytest.mark.slow)])
def test_device_that_leaves_takes_nothing_with_it(leaver, idle):
    results = outcomes(3 + idle, depart, leaver, idle)
    assert results[leaver].error is None, results[leaver].trace
    check_goes_on(results, {leaver}, at_most=0)
    survivor = results[(leaver + 1) % 3].value
    assert [(e.kind, e.devices, e.call) for e in survivor["events"]] == [
        ("leave", (f"d{leaver}",), 4)
    ]
    losses, _ = plain(list(range(STEPS)))
    assert survivor["losses"] == pytest.approx(losses, rel=1e-4)


# ------------------------------------------------------------ snapshots, explicit ones


def lose_after_snapshot(rank: int) -> Any:
    """Nothing is lost if the snapshot is of the last complete step."""
    case, model = build(snapshot_interval=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-3)
    for i in range(4):
        optimizer.zero_grad()
        model.step(*batch(i), case.loss_fn)
        optimizer.step()
    model.snapshot()
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        model.snapshot()
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == (threads, files)
    if rank == 0:
        die()
    optimizer.zero_grad()
    model.step(*batch(4), case.loss_fn)
    events = list(model.events)
    model.close()
    return [(e.kind, e.devices, e.call, e.lost_steps, e.lost_calls) for e in events]


@pytest.mark.slow
def test_nothing_is_lost_after_a_snapshot():
    for result in outcomes(3, lose_after_snapshot)[1:]:
        assert result.error is None, result.trace
        assert result.value == [("recovery", ("d0",), 4, 0, 0)]


def fail_in_user_code(rank: int) -> None:
    lose(rank, {1: (4, "forward")}, {}, "divide")


def divide() -> None:
    raise ZeroDivisionError("the block divided by zero")


@pytest.mark.slow
def test_error_of_the_program_ends_the_job():
    results = outcomes(3, fail_in_user_code)
    assert isinstance(results[1].error, ZeroDivisionError)
    for rank in (0, 2):
        assert isinstance(results[rank].error, PeerLostError)
        assert "first failure, on rank 1: ZeroDivisionError" in str(results[rank].error)


def recover_over_gloo(rank: int) -> None:
    build(transport="gloo", shares=((1,), (1,)))


@pytest.mark.slow
def test_gloo_refuses_to_survive():
    for result in outcomes(2, recover_over_gloo):
        assert "allowed: with 'dora' only" in str(result.error)


# ------------------------------------------------------------ the decision


def report(rank: int, names: str, **fields: Any) -> Report:
    values = {
        "position": 5,
        "kind": "train",
        "has_result": False,
        "is_leaving": False,
        "version": Version(4, 5),
        "updates": 4,
        "here": tuple(names),
        "stores": (),
        "limit_bytes": 10,
        **fields,
    }
    return Report(**values)


def verdict(reports: dict[int, Report], num_devices: int = 3) -> Any:
    devices = [f"d{i}" for i in range(num_devices)]
    return decide(reports, "abc", devices, lambda gone, _: f"without {','.join(gone)}")


def test_state_of_now_is_taken_if_all_of_it_is_there():
    copy = Store(Version(4, 5), 4, ("b",))
    decided = verdict({0: report(0, "a", stores=(copy,)), 2: report(2, "c")})
    assert (decided.label, decided.lost_steps, decided.lost_calls) == (None, 0, 0)
    assert (decided.members, decided.devices, decided.plan) == ((0, 2), ("d1",), "without d1")


def test_older_state_costs_what_it_is_behind():
    old = [Store(Version(2, 3), 2, tuple(names)) for names in ("ab", "c")]
    decided = verdict({0: report(0, "a", stores=(old[0],)), 2: report(2, "c", stores=(old[1],))})
    assert decided.label == Version(2, 3)
    assert (decided.lost_steps, decided.lost_calls) == (2, 2)


def test_states_that_differ_are_not_mixed():
    ahead = report(0, "abc", position=6, version=Version(5, 6), updates=5)
    waiting = report(2, "abc", has_result=True)  # it has its gradients, and steps no more
    whole = Store(Version(4, 5), 4, tuple("abc"))
    assert verdict({0: ahead, 2: waiting}).error.endswith("give each stage a replica")
    decided = verdict({0: ahead._replace(stores=(whole,)), 2: waiting})
    assert (decided.label, decided.lost_steps, decided.lost_calls) == (Version(4, 5), 1, 1)
    assert waiting.is_complete(decided.top)
    assert (decided.base, decided.top) == (6, 6)


def test_one_part_of_a_split_network_goes_on():
    parts = [(0, 1), (2,)], [(0,), (1, 2)], [(0, 3), (1, 2)], [(1, 3), (0, 2)]
    for one, other in parts:
        errors = []
        for here, silent in ((one, other), (other, one)):
            reports = {rank: report(rank, "abc") for rank in here}
            decided = decide(reports, "abc", ["d0", "d1", "d2", "d3"], lambda *_: "", silent)
            errors.append(decided.error)
        assert sorted(map(bool, errors)) == [False, True]


def test_nobody_is_left_if_all_leave():
    assert verdict({0: report(0, "abc", is_leaving=True)}).error == "all devices leave"


@given(st.integers(1, 4), st.sets(st.integers(0, 3)), st.integers(0, 2))
def test_every_stage_has_a_keeper_that_holds_something_else(num_stages, dead, idle):
    plan = make_plan(12, [[1]] * num_stages, idle=idle)
    members = [r for r in range(num_stages + idle) if r not in dead]
    for rank, keeper in keepers(plan, members).items():
        assert rank != keeper
        assert {rank, keeper} <= set(members)
    if len(members) > 1:
        placed = {r for r in members if plan.placement(r)}
        assert set(keepers(plan, members)) == placed


@given(
    st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=2), min_size=1, max_size=4),
    st.integers(0, 2),
    st.data(),
)
def test_plan_without_lost_devices_covers_the_model(shares, idle, data):
    plan = make_plan(8, shares, idle=idle)
    lost = data.draw(st.sets(st.sampled_from(plan.devices), max_size=len(plan.devices) - 1))
    used = {r.device for stage in plan.stages for r in stage.replicas}
    try:
        found = plan_without(plan, lost, [], need_bytes=lambda p, d: 1, limit_bytes=lambda d: 1)
    except InfeasiblePlanError:
        assert used <= lost
        assert len(plan.devices) - len(used) == len(lost - used)
        return
    assert is_without(found, lost)
    assert found.num_blocks == plan.num_blocks
    assert len(found.devices) == len(plan.devices)


def test_blocks_go_where_memory_is():
    plan = make_plan(9, [[1], [1], [1]])
    room = {"d0": 4, "d2": 5}

    def need(candidate: Any, device: str) -> int:
        return sum(
            s.last_block - s.first_block + 1
            for s in candidate.stages
            for r in s.replicas
            if r.device == device
        )

    found = plan_without(plan, {"d1"}, [], need_bytes=need, limit_bytes=room.__getitem__)
    assert [(s.first_block, s.last_block) for s in found.stages] == [(0, 3), (4, 8)]
    with pytest.raises(InfeasiblePlanError, match="does not fit the memory"):
        plan_without(plan, {"d1"}, [], need_bytes=need, limit_bytes=lambda d: 4)
    bank = [plan, make_plan(9, [[1], [1]], idle=1)]
    assert plan_without(plan, {"d2"}, bank, need_bytes=need, limit_bytes=lambda d: 9) == bank[1]
