"""The simulator: closed forms, changes over time, what every program keeps, and one price for all.

Programs of messages are played as they are (`dora._C.Program`); pipelines through `simulate`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise, permutations
from math import inf
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import make_plan

from dora._C import Network, Played, Program
from dora.errors import ScheduleError
from dora.planner.layouts import step_costs, to_plan
from dora.planner.predict import Group, Layout, Prediction, Setting, evaluate, setting
from dora.scheduler import build_schedule
from dora.simulator import Dynamics, StepCosts, compile_step, memory_over_time, simulate
from dora.spec import (
    Action,
    BlockCost,
    BlockProfile,
    BoundaryCodec,
    Cluster,
    Device,
    Link,
    Medium,
    ModelProfile,
    Plan,
    PowerMode,
    Span,
    TiedParameter,
    Timeline,
    Timing,
    Transfer,
    Workload,
    warmup_for,
)

few = settings(max_examples=50)

# ------------------------------------------------------------ messages


class Flow(NamedTuple):
    """A message from a rank of its own to another one, between two computes."""

    media: tuple[int, ...] = (0,)
    num_bytes: float = 100.0
    head_s: float = 0.0
    tail_s: float = 0.0
    latency_s: float = 0.0
    priority: float = 0.0
    pace: float = 0.0
    not_before_s: float = 0.0


def flow_program(
    media: Sequence[tuple[float, Sequence[float]]],
    flows: Sequence[Flow],
    discipline: str = "fair",
) -> Program:
    network = Network(2 * len(flows))
    for rate, efficiency in media:
        network.add_medium(rate, efficiency)
    for i, flow in enumerate(flows):
        network.connect(2 * i, 2 * i + 1, flow.media, flow.latency_s)
    program = Program(network, discipline)
    for i, flow in enumerate(flows):
        t = program.transfer(
            2 * i, 2 * i + 1, flow.num_bytes, flow.priority, flow.pace, flow.not_before_s
        )
        program.compute(2 * i, flow.head_s)
        program.send(2 * i, t)
        program.receive(2 * i + 1, t)
        program.compute(2 * i + 1, flow.tail_s, t)
    return program


def arrivals(
    rates: Sequence[float], flows: Sequence[Flow], discipline: str = "fair"
) -> list[float]:
    played = flow_program([(rate, [1.0]) for rate in rates], flows, discipline).play()
    return [end_s for _, end_s in played.transfers()]


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_equal_flows_end_together(k):
    efficiency = [1.0, 0.8, 0.5]
    played = flow_program([(10.0, efficiency)], [Flow()] * k).play()
    total_s = k * 100 / (10 * efficiency[min(k, 3) - 1])
    assert [end for _, end in played.transfers()] == pytest.approx([total_s] * k)
    assert played.medium_busy_s == pytest.approx([total_s])


def test_priority_sends_one_after_the_other_without_contention():
    flows = [Flow(priority=p) for p in (1, 3, 2)]
    played = flow_program([(10.0, [1.0, 0.5])], flows, "priority").play()
    assert [end for _, end in played.transfers()] == pytest.approx([30, 10, 20])


def test_urgent_flow_interrupts_and_the_total_stays():
    flows = [Flow(priority=1), Flow(num_bytes=50, head_s=4, priority=2)]
    assert arrivals([10], flows, "priority") == pytest.approx([15, 9])
    # Shared fairly, both have 5 bytes/s from 4 s on: 50 bytes until 14, and the first 10 more.
    assert arrivals([10], flows) == pytest.approx([15, 14])


def test_relay_crosses_its_channel_twice():
    assert arrivals([10], [Flow(media=(0, 0))]) == pytest.approx([20])


def test_half_duplex_shares_what_full_duplex_has_twice():
    there, back = Flow(media=(0,)), Flow(media=(1,))
    assert arrivals([10, 10], [there, back]) == pytest.approx([10, 10])
    assert arrivals([10], [there, there]) == pytest.approx([20, 20])


def test_flow_speeds_up_when_its_bottleneck_clears():
    # 5 bytes/s each until the short one has sent 50 at 10 s; then 10 bytes/s for the other 50.
    assert arrivals([10], [Flow(), Flow(num_bytes=50)]) == pytest.approx([15, 10])


def test_latency_delays_the_arrival_and_holds_no_medium():
    assert arrivals([10], [Flow(latency_s=3)]) == pytest.approx([13])
    flows = [Flow(latency_s=3, priority=1), Flow()]
    assert arrivals([10], flows, "priority") == pytest.approx([13, 20])
    assert arrivals([10], [Flow(num_bytes=0, latency_s=3)]) == pytest.approx([3])


def test_pace_leaves_the_rest_to_others():
    flows = [Flow(pace=4, priority=1), Flow()]
    assert arrivals([10], flows, "priority") == pytest.approx([25, 100 / 6])
    assert arrivals([10], flows) == pytest.approx([25, 100 / 6])


def test_not_before_holds_a_transfer_back():
    assert arrivals([10], [Flow(not_before_s=7)]) == pytest.approx([17])
    assert arrivals([10], [Flow(not_before_s=7, head_s=8)]) == pytest.approx([18])


@pytest.mark.parametrize(("head_s", "size", "end_s"), [(0.1, 0.2, 0.3), (1.1, 2.2, 3.3)])
def test_rounding_does_not_hold_up_what_is_sent(head_s, size, end_s):
    """A more urgent flow starts when one ends: what rounding leaves of that does not wait."""
    assert head_s + size > end_s
    flows = [Flow(num_bytes=size, head_s=head_s), Flow(head_s=end_s, priority=1)]
    assert arrivals([1], flows, "priority") == pytest.approx([end_s, end_s + 100])


def exchange(network: Network, ranks: Sequence[int], num_bytes: float) -> Played:
    program = Program(network)
    program.all_reduce(ranks, num_bytes)
    return program.play()


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_ring_all_reduce_takes_two_rounds_per_peer(k):
    private, shared = Network(k), Network(k)
    channel = shared.add_medium(10.0, [1.0])
    for i in range(k):
        private.connect(i, (i + 1) % k, [private.add_medium(10.0, [1.0])], 0.5)
        shared.connect(i, (i + 1) % k, [channel], 0.0)
    rounds = 2 * (k - 1)
    alone, contended = (exchange(network, range(k), 60.0) for network in (private, shared))
    assert alone.end_s == pytest.approx(rounds * (60 / k / 10 + 0.5))
    assert contended.end_s == pytest.approx(rounds * 60 / 10)
    assert alone.sent_bytes == alone.received_bytes == pytest.approx([rounds * 60 / k] * k)


def changed(change: Callable[[Program], None]) -> Played:
    """Plays 4 s of compute, 100 bytes at 10 bytes/s, and 2 s of compute: 16 s."""
    program = flow_program([(10.0, [1.0])], [Flow(head_s=4, tail_s=2)])
    change(program)
    return program.play()


def test_rate_changes_in_mid_transfer():
    assert changed(lambda p: p.change_rate(9, 0, 0.5)).end_s == pytest.approx(4 + 5 + 10 + 2)
    assert changed(lambda p: p.change_rate(0, 0, 2.0)).end_s == pytest.approx(4 + 5 + 2)


def test_speed_changes_in_mid_compute():
    assert changed(lambda p: p.change_speed(2, 0, 0.5)).end_s == pytest.approx(2 + 4 + 10 + 2)
    assert changed(lambda p: p.change_speed(15, 1, 2.0)).end_s == pytest.approx(15.5)


@pytest.mark.parametrize("kind", ["change_rate", "change_speed"])
def test_what_pauses_goes_on_where_it_was(kind):
    def pause(program: Program) -> None:
        at_s = 9 if kind == "change_rate" else 1
        getattr(program, kind)(at_s, 0, 0.0)
        getattr(program, kind)(at_s + 30, 0, 1.0)

    assert changed(pause).end_s == pytest.approx(16 + 30)


def test_what_never_returns_is_stuck():
    gone = changed(lambda p: p.change_speed(1, 0, 0.0))
    assert (gone.stuck, gone.end_s) == (0, inf)
    assert changed(lambda p: p.change_rate(9, 0, 0.0)).stuck == 1
    assert changed(lambda p: p.change_speed(100, 0, 0.0)).stuck == -1


def test_change_of_something_unknown_fails():
    with pytest.raises(IndexError):
        changed(lambda p: p.change_rate(0, 1, 1.0))
    with pytest.raises(IndexError):
        changed(lambda p: p.change_speed(0, 2, 1.0))


jobs = st.tuples(st.integers(0, 12), st.integers(1, 9), st.integers(0, 25))


@few
@given(st.lists(jobs, min_size=1, max_size=5))
def test_largest_tail_first_is_optimal_on_one_medium(given_jobs):
    """Jackson's preemptive rule, against all orders."""
    flows = [Flow((0,), size, head_s=head, tail_s=tail) for head, size, tail in given_jobs]
    program = flow_program([(1.0, [1.0])], flows, "priority")
    assert program.tails() == [flow.tail_s for flow in flows]

    def end_s(priorities: Sequence[float]) -> float:
        program.prioritise(priorities)
        return program.play().end_s

    best_s = min(map(end_s, permutations(range(len(flows)))))
    assert end_s(program.tails()) == pytest.approx(best_s)


# ------------------------------------------------------------ any program


class Message(NamedTuple):
    src: int
    dst: int
    num_bytes: float
    work_s: float
    receive_first: bool


class Case(NamedTuple):
    """Messages in an order that no rank contradicts, so that nothing waits for ever."""

    num_ranks: int
    messages: list[Message]
    num_media: int
    latency_s: float

    def medium(self, src: int, dst: int) -> int:
        return (src * self.num_ranks + dst) % self.num_media


RATE = 10.0


@st.composite
def cases(draw: st.DrawFn, *, max_bytes: float = 100.0) -> Case:
    num_ranks = draw(st.integers(2, 4))
    pair = st.tuples(st.integers(0, num_ranks - 1), st.integers(1, num_ranks - 1))
    message = st.tuples(pair, st.floats(0, max_bytes), st.floats(0, 9), st.booleans()).map(
        lambda m: Message(m[0][0], (m[0][0] + m[0][1]) % num_ranks, m[1], m[2], m[3])
    )
    messages = draw(st.lists(message, min_size=1, max_size=12))
    return Case(num_ranks, messages, draw(st.integers(1, 4)), draw(st.sampled_from([0.0, 0.3])))


def build(case: Case, discipline: str, *, speed: float = 1.0) -> Program:
    network = Network(case.num_ranks)
    for _ in range(case.num_media):
        network.add_medium(RATE * speed, [1.0])
    for a, b in permutations(range(case.num_ranks), 2):
        network.connect(a, b, [case.medium(a, b)], case.latency_s / speed)
    program = Program(network, discipline)
    for message in case.messages:
        t = program.transfer(message.src, message.dst, message.num_bytes)
        program.send(message.src, t)
        program.receive(message.dst, t)
        program.compute(message.dst, message.work_s / speed, t)
        program.compute(message.src, message.work_s / 2 / speed)
    program.prioritise(program.tails())
    return program


def alone_s(case: Case, message: Message) -> float:
    return message.num_bytes / RATE + case.latency_s


def earliest_s(case: Case) -> float:
    """Returns the end if no transfer waited for another: the critical path."""
    at = [0.0] * case.num_ranks
    arrival_s = 0.0
    for message in case.messages:
        begin_s = max(at[message.src], at[message.dst])
        arrival_s = begin_s + alone_s(case, message)
        at[message.dst] = arrival_s + message.work_s
        at[message.src] += message.work_s / 2
    return max(at)


def longest_tails(case: Case) -> list[float]:
    """Returns tails by walking the messages backwards."""
    rest, found = [0.0] * case.num_ranks, []
    for message in reversed(case.messages):
        tail = rest[message.dst] + message.work_s
        found.append(tail)
        rest[message.dst] = tail
        path = alone_s(case, message) + tail
        rest[message.src] = max(rest[message.src] + message.work_s / 2, path)
    return found[::-1]


disciplines = st.sampled_from(["fair", "priority"])


@few
@given(cases())
def test_tails_are_longest_paths(case):
    assert build(case, "fair").tails() == pytest.approx(longest_tails(case), abs=1e-9)


@few
@given(cases(max_bytes=0.0), disciplines)
def test_without_bytes_the_critical_path_is_all(case, discipline):
    assert build(case, discipline).play().end_s == pytest.approx(earliest_s(case), abs=1e-9)


@few
@given(cases(), disciplines)
def test_end_respects_every_lower_bound(case, discipline):
    played = build(case, discipline).play()
    assert played.stuck == -1
    loads = [0.0] * case.num_media
    for message in case.messages:
        loads[case.medium(message.src, message.dst)] += message.num_bytes / RATE
    bounds = [earliest_s(case), *played.busy_s, *loads]
    assert played.end_s >= max(bounds) * (1 - 1e-9)
    # No medium carries faster than it can, and none rests with something to carry.
    assert played.medium_busy_s == pytest.approx(loads, abs=1e-6)


@few
@given(cases(), disciplines)
def test_bytes_and_seconds_are_conserved(case, discipline):
    played = build(case, discipline).play()
    for rank in range(case.num_ranks):
        sent = sum(m.num_bytes for m in case.messages if m.src == rank)
        received = sum(m.num_bytes for m in case.messages if m.dst == rank)
        work = sum(m.work_s for m in case.messages if m.dst == rank)
        work += sum(m.work_s / 2 for m in case.messages if m.src == rank)
        assert played.sent_bytes[rank] == pytest.approx(sent)
        assert played.received_bytes[rank] == pytest.approx(received)
        assert played.busy_s[rank] == pytest.approx(work)
    for message, (start_s, end_s) in zip(case.messages, played.transfers(), strict=True):
        assert end_s - start_s >= alone_s(case, message) - 1e-9


@few
@given(cases(), disciplines)
def test_same_program_same_play(case, discipline):
    one, other = (build(case, discipline).play() for _ in range(2))
    assert one.transfers() == other.transfers()
    assert [one.ops(r) for r in range(case.num_ranks)] == [
        other.ops(r) for r in range(case.num_ranks)
    ]


@few
@given(cases(), disciplines, st.sampled_from([0.5, 4.0]))
def test_all_faster_ends_earlier_in_proportion(case, discipline, speed):
    # Powers of two scale without rounding, so that no tie is decided in another way.
    end_s = build(case, discipline).play().end_s
    assert build(case, discipline, speed=speed).play().end_s == pytest.approx(end_s / speed)


# ------------------------------------------------------------ pipelines


def make_device(name: str, **fields: object) -> Device:
    numbers = {"flops_per_s": 1e12, "mem_bandwidth_bytes_per_s": 1e11, "memory_bytes": 10**12}
    return Device.model_validate({"name": name, **numbers, **fields})


def make_cluster(names: Sequence[str], kind: str = "private", *, rate: float = 1e3) -> Cluster:
    """'private': a medium per direction; 'duplex': per pair; 'wifi': one channel with a relay."""
    devices = tuple(
        make_device(
            name,
            idle_w=1.5,
            busy_w=9.0 + i,
            tx_j_per_byte=1e-6,
            rx_j_per_byte=2e-6,
            power_modes=(PowerMode(name="eco", speed_factor=0.61, power_factor=0.37),),
        )
        for i, name in enumerate(names)
    )
    paths = {
        (a, b): {
            "private": (f"{a}>{b}",),
            "duplex": ("-".join(sorted((a, b))),),
            "wifi": ("wifi",),
            "relay": ("wifi", "wifi"),
            "switch": (f"{a} up", f"{b} down"),
        }[kind]
        for a, b in permutations(names, 2)
    }
    media = sorted({medium for path in paths.values() for medium in path})
    contention = (1.0, 0.9, 0.8) if kind in ("wifi", "relay") else (1.0,)
    return Cluster(
        devices=devices,
        media=tuple(Medium(name=m, rate_bytes_per_s=rate, contention=contention) for m in media),
        links=tuple(Link(src=a, dst=b, media=path) for (a, b), path in paths.items()),
    )


def uniform(plan: Plan, *, forward_s: float, backward_s: float, send_bytes: float) -> StepCosts:
    ranks, stages = range(len(plan.devices)), range(len(plan.stages))
    times = {"F": forward_s, "B": backward_s}
    return StepCosts(
        compute_s={(r, kind): times[kind] for r in ranks for kind in "FB"},
        send_bytes={(s, kind): send_bytes for s in stages for kind in ("SEND_F", "SEND_B")},
        reductions=(),
        fixed_bytes=(1000.0,) * len(ranks),
        kept_bytes=(10.0,) * len(ranks),
        power_factors=(1.0,) * len(ranks),
    )


def chain_s(
    num_stages: int,
    m: int,
    kind: str,
    *,
    send_s: float = 0.0,
    network: str = "private",
    extra: int = 0,
) -> float:
    """Plays stages of one device with forwards of 2 s and backwards of 3 s."""
    shares = [[1.0]] * num_stages
    warmup = warmup_for(shares, extra=extra)
    plan = make_plan(num_stages, shares, num_microbatches=m, schedule_kind=kind, warmup=warmup)
    costs = uniform(plan, forward_s=2.0, backward_s=3.0, send_bytes=send_s * 1e3)
    cluster = make_cluster(plan.devices, network)
    return simulate(plan, build_schedule(plan), costs, cluster).makespan_s


@pytest.mark.parametrize("kind", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("num_stages", "m"), [(1, 3), (2, 4), (4, 8), (5, 3)])
def test_uniform_pipeline_without_communication(kind, num_stages, m):
    """(m + p - 1) (f + b): each stage is busy for m (f + b) and idle for p - 1 of both."""
    assert chain_s(num_stages, m, kind) == pytest.approx((m + num_stages - 1) * 5)


@pytest.mark.parametrize("network", ["private", "duplex"])
@pytest.mark.parametrize("send_s", [0.5, 1.7, 2.6, 7.0])
@pytest.mark.parametrize(("num_stages", "m"), [(2, 4), (4, 8)])
def test_uniform_gpipe_with_communication(network, send_s, num_stages, m):
    """(p - 1) (f + b + 2c) to pass all stages, then one per slower of compute and wire.

    The forwards arrive at the last stage every max(f, c), its backwards at the first every
    max(b, c); the last stage starts them as soon as its last forward has ended.
    """
    paces = max(2, send_s) + max(3, send_s)
    expected = (num_stages - 1) * (5 + 2 * send_s) + (m - 1) * paces + 5
    assert chain_s(num_stages, m, "gpipe", send_s=send_s, network=network) == pytest.approx(
        expected
    )


@pytest.mark.parametrize("send_s", [0.5, 1.0])
@pytest.mark.parametrize(("num_stages", "rounds"), [(2, 0), (2, 3), (3, 4), (4, 2)])
def test_uniform_1f1b_with_communication(send_s, num_stages, rounds):
    """(r + 1) (p (f + b) + 2 (p - 1) c) for m = r p + 1 micro-batches.

    With windows p, p - 1, ..., 1 the first stage starts a forward once the backward of p
    micro-batches before has returned: the last one has to wait for r such round trips, one after
    the other, and takes another one.
    """
    round_trip_s = num_stages * 5 + 2 * (num_stages - 1) * send_s
    found = chain_s(num_stages, rounds * num_stages + 1, "1f1b", send_s=send_s)
    assert found == pytest.approx((rounds + 1) * round_trip_s)


@pytest.mark.parametrize("send_s", [0.5, 1.0, 2.0])
def test_deeper_windows_show_each_message_once(send_s):
    """(m + p - 1) (f + b) + 2 (p - 1) c, as GPipe takes, but with fewer activations."""
    expected = (12 + 3) * 5 + 6 * send_s
    assert chain_s(4, 12, "1f1b", send_s=send_s, extra=2) == pytest.approx(expected)


def inference(
    arrivals_s: Sequence[float] = (),
    *,
    source: int | None = None,
    start_s: float = 0.0,
    **fields: object,
) -> Timeline:
    """Plays two stages of 2 s per frame and messages of 1 s; `d2` is in no stage."""
    plan = make_plan(2, [[1.0]] * 2, idle=1, num_microbatches=3, schedule_kind="wavefront")
    costs = uniform(plan, forward_s=2.0, backward_s=0.0, send_bytes=1000.0)
    costs = costs._replace(source=source, input_bytes=500.0)
    cluster = make_cluster(plan.devices)
    schedule = build_schedule(plan).model_copy(update=fields)
    return simulate(plan, schedule, costs, cluster, arrivals_s=arrivals_s, start_s=start_s)


def ends(timeline: Timeline) -> dict[str, float]:
    return {s.label: s.end_s for s in timeline.spans if s.lane in ("compute", "network")}


def test_frames_are_computed_when_they_arrive():
    timeline = inference((0.0, 1.0, 9.0))
    assert [ends(timeline)[f"0F{m}"] for m in range(3)] == pytest.approx([2, 4, 11])
    assert [ends(timeline)[f"1F{m}"] for m in range(3)] == pytest.approx([5, 7, 14])


def test_inputs_travel_from_their_source():
    timeline = inference(source=2)
    assert [ends(timeline)[f"input {m}"] for m in range(3)] == pytest.approx([0.5, 1, 1.5])
    assert timeline.makespan_s == pytest.approx(0.5 + 3 * 2 + 1 + 2)
    # It sends 1500 bytes, and no power is counted for a device that does nothing else.
    assert timeline.energy[2].joules == pytest.approx(1500 * 1e-6)
    late = ends(inference((0.0, 0.0, 9.0), source=2))
    assert (late["input 2"], late["0F2"]) == pytest.approx((9.5, 11.5))


def test_first_stage_at_the_source_receives_nothing():
    assert inference(source=0) == inference()


def test_start_moves_everything():
    wish = Transfer(src=0, dst=1, num_bytes=1000, action=Action(0, "SEND_F", 0), not_before_s=4.0)
    wish = wish.model_copy(update={"priority": 100.0})
    timeline = inference(transfers=(wish,))
    assert ends(timeline)["0SEND_F0"] == pytest.approx(5)
    later = inference(transfers=(wish,), start_s=100.0)
    for a, b in zip(timeline.spans, later.spans, strict=True):
        assert (b.start_s, b.end_s) == pytest.approx((a.start_s + 100, a.end_s + 100))
    assert later.makespan_s == pytest.approx(timeline.makespan_s)
    assert later.energy_j == pytest.approx(timeline.energy_j)


def test_schedule_decides_priority_and_pace():
    """Both messages of a channel are there at 1 s; the schedule says which one goes first."""
    plan = make_plan(2, [[0.5, 0.5], [0.5, 0.5]], num_microbatches=2, schedule_kind="wavefront")
    costs = uniform(plan, forward_s=1.0, backward_s=0.0, send_bytes=1000.0)
    cluster, schedule = make_cluster(plan.devices, "wifi"), build_schedule(plan)
    for urgent in (0, 1):
        transfers = tuple(
            Transfer(
                src=m,
                dst=2 + m,
                num_bytes=1000,
                action=Action(0, "SEND_F", m),
                priority=m == urgent,
            )
            for m in (0, 1)
        )
        found = ends(
            simulate(plan, schedule.model_copy(update={"transfers": transfers}), costs, cluster)
        )
        assert found[f"0SEND_F{urgent}"] == pytest.approx(2)
        assert found[f"0SEND_F{1 - urgent}"] == pytest.approx(3)
    fair = ends(simulate(plan, schedule, costs, cluster, discipline="fair"))
    assert fair["0SEND_F0"] == fair["0SEND_F1"] == pytest.approx(1 + 2 / 0.9)
    paced = transfers[1].model_copy(update={"pace_bytes_per_s": 100.0, "priority": 9.0})
    found = ends(
        simulate(plan, schedule.model_copy(update={"transfers": (paced,)}), costs, cluster)
    )
    assert found["0SEND_F1"] == pytest.approx(11)


def traced(*entries: tuple[float, str, float], start_s: float = 0.0) -> Timeline:
    plan = make_plan(2, [[1.0]] * 2, num_microbatches=2)
    costs = uniform(plan, forward_s=2.0, backward_s=3.0, send_bytes=0.0)
    return simulate(
        plan,
        build_schedule(plan),
        costs,
        make_cluster(plan.devices),
        dynamics=Dynamics(entries),
        start_s=start_s,
    )


def test_dynamics_slow_a_device_down():
    assert traced().makespan_s == pytest.approx(15)
    assert traced((0, "d0", 0.5), (0, "d1", 0.5)).makespan_s == pytest.approx(30)
    # Half an hour into the trace both are back.
    entries = ((0.0, "d0", 0.5), (0.0, "d1", 0.5), (1800.0, "d0", 1.0), (1800.0, "d1", 1.0))
    assert traced(*entries, start_s=1800.0).makespan_s == pytest.approx(15)


@pytest.mark.parametrize("name", ["d0", "d1"])
def test_device_that_has_gone_is_named(name):
    with pytest.raises(ScheduleError, match=rf"rank {name[1]} \({name}\) never ends"):
        traced((3, name, 0.0))


def test_missing_link_is_an_error():
    plan = make_plan(2, [[1.0]] * 2)
    cluster = make_cluster(plan.devices).model_copy(update={"links": ()})
    costs = uniform(plan, forward_s=1.0, backward_s=1.0, send_bytes=1.0)
    with pytest.raises(ValueError, match="no link from device 0 to device 1"):
        simulate(plan, build_schedule(plan), costs, cluster)


# ------------------------------------------------------------ random plans

KINDS = ("private", "duplex", "wifi", "relay", "switch")
CODECS = ("none", "int8", "int4", "fp8")


class Priced(NamedTuple):
    """A plan with all that the planner and the simulator know about it."""

    plan: Plan
    layout: Layout
    known: Setting
    costs: StepCosts
    cluster: Cluster
    prediction: Prediction

    @property
    def timeline(self) -> Timeline:
        return simulate(self.plan, self.schedule, self.costs, self.cluster)

    @property
    def schedule(self):
        tied = {
            s
            for blocks, _ in self.known.costs.tied_bytes
            for s, group in enumerate(self.layout.groups)
            if any(group.first <= b < group.end for b in blocks)
        }
        return build_schedule(
            self.plan,
            training=self.known.training,
            reduce_stages=frozenset(tied) if len(tied) > 1 else frozenset(),
        )


def make_profile(draw: st.DrawFn, names: Sequence[str], num_blocks: int) -> ModelProfile:
    # Odd factors, so that no two times are equal by chance and rounding decides nothing.
    seed = draw(st.integers(1, 10**6))
    blocks = []
    for i in range(num_blocks):
        timings = tuple(
            Timing(
                device=name,
                forward_s=0.1 + ((seed + 7919 * (i + 1) * (d + 1)) % 1009) / 1009,
                backward_s=0.2 + ((seed + 104729 * (i + 2) * (d + 1)) % 1013) / 1013,
            )
            for d, name in enumerate(names)
        )
        size = 50 + (seed * (i + 3)) % 997
        cost = BlockCost(
            microbatch_size=1,
            flops=1,
            activation_bytes=10 * size,
            output_bytes=size,
            timings=timings,
        )
        block = BlockProfile(
            name=f"b{i}",
            num_params=size,
            param_bytes=4 * size,
            trainable_bytes=4 * size,
            costs=(cost,),
        )
        blocks.append(block)
    tied = (TiedParameter(name="t", blocks=(0, num_blocks - 1), param_bytes=100),)
    return ModelProfile(
        blocks=tuple(blocks), tied=tied if draw(st.booleans()) else (), input_bytes=300
    )


@st.composite
def priced_plans(draw: st.DrawFn) -> Priced:
    sizes = draw(st.lists(st.integers(1, 2), min_size=1, max_size=3))
    m = draw(st.integers(max(sizes), 6))
    order = draw(st.permutations(range(sum(sizes) + 1)))  # one device is left out
    names = [f"d{i}" for i in range(len(order))]
    training = draw(st.booleans())
    num_blocks = len(sizes) + 1
    groups, counts, given_devices = [], [], iter(order)
    for s, size in enumerate(sizes):
        end = s + 1 if s + 1 < len(sizes) else num_blocks
        groups.append(Group(s, end, tuple(next(given_devices) for _ in range(size))))
        first = draw(st.integers(1, m - 1)) if size == 2 else m
        counts.append((first, m - first)[:size])
    windows = sorted(draw(st.lists(st.integers(1, m), min_size=len(sizes), max_size=len(sizes))))
    codec = st.builds(
        BoundaryCodec, forward=st.sampled_from(CODECS), backward=st.sampled_from(CODECS)
    )
    codecs = draw(
        st.one_of(st.just([]), st.lists(codec, min_size=len(sizes) - 1, max_size=len(sizes) - 1))
    )
    used = order[:-1]
    layout = Layout(
        tuple(groups),
        tuple(counts),
        tuple(windows[::-1]),
        draw(st.sampled_from(["gpipe", "1f1b"])) if training else "wavefront",
        tuple((d, "eco") for d in sorted(used) if draw(st.booleans())),
        tuple(codecs),
    )
    cluster = make_cluster(names, draw(st.sampled_from(KINDS)))
    profile = make_profile(draw, names, num_blocks)
    workload = Workload(
        kind="train" if training else "infer",
        batch_size=m,
        source=draw(st.sampled_from([None, *names])),
    )
    known = setting(profile, cluster, workload, m)
    prediction = evaluate(layout, known)
    plan = to_plan(layout, prediction, known, names)
    costs = step_costs(profile, cluster, workload, plan)
    return Priced(plan, layout, known, costs, cluster, prediction)


@settings(max_examples=100)
@given(priced_plans())
def test_planner_and_simulator_agree(case):
    """They walk the same lists: one builds them in C++, the other from the runtime's schedule."""
    timeline, prediction = case.timeline, case.prediction
    assert timeline.makespan_s == pytest.approx(prediction.makespan_s, rel=1e-9)
    joules = {energy.device: energy.joules for energy in timeline.energy}
    for d, expected in zip(case.layout.devices, prediction.energy_j, strict=True):
        assert joules.pop(f"d{d}") == pytest.approx(expected, rel=1e-9)
    # What is left out costs nothing but what it sends as the source.
    assert list(joules.values()) == pytest.approx([prediction.source_j], rel=1e-9)
    peaks = {memory.device: memory.peak_bytes for memory in timeline.memory}
    expected_peaks = zip(case.layout.devices, prediction.peak_bytes, strict=True)
    assert peaks == {f"d{d}": int(peak) for d, peak in expected_peaks}


@few
@given(priced_plans())
def test_timeline_is_feasible(case):
    timeline = case.timeline
    assert timeline.source == "predicted"
    assert {energy.provenance for energy in timeline.energy} == {"modelled"}
    computes: dict[Action, Span] = {}
    for rank, actions in enumerate(case.schedule.actions_by_rank):
        own = [s for s in timeline.spans if s.rank == rank and s.lane == "compute"]
        assert [s.label for s in own] == [str(a) for a in actions if a.kind in ("F", "B")]
        for a, b in pairwise(own):
            assert b.start_s >= a.end_s
        computes |= {Action.from_str(s.label): s for s in own}
    for span in timeline.spans:
        if span.lane == "network" and "SEND" in span.label:
            stage, kind, m = Action.from_str(span.label)
            sender = Action(stage, kind[-1], m)
            receiver = Action(stage + (1 if kind == "SEND_F" else -1), kind[-1], m)
            assert computes[sender].end_s <= span.start_s <= span.end_s
            assert span.end_s <= computes[receiver].start_s
        if span.label.startswith("input"):
            assert span.end_s <= computes[Action(0, "F", int(span.label.split()[1]))].start_s


@few
@given(priced_plans())
def test_step_respects_every_lower_bound(case):
    timeline = case.timeline
    for rank in range(timeline.num_ranks):
        assert timeline.busy_s(rank, "compute") <= timeline.makespan_s * (1 + 1e-9)
    rates = {medium.name: medium.rate_bytes_per_s for medium in case.cluster.media}
    loads = dict.fromkeys(rates, 0.0)
    paths = {(link.src, link.dst): link.media for link in case.cluster.links}
    sends = [(m, s, k) for m in case.plan.routes for s, k in case.costs.send_bytes]
    for route, stage, kind in sends:
        to = stage + 1 if kind == "SEND_F" else stage - 1
        if kind == "SEND_B" and not case.known.training:
            continue
        src, dst = (case.plan.devices[case.plan.rank_of(s, route[s])] for s in (stage, to))
        for name in paths[src, dst]:
            loads[name] += case.costs.send_bytes[stage, kind] / rates[name]
    assert max(loads.values()) <= timeline.makespan_s * (1 + 1e-9)


@few
@given(priced_plans())
def test_memory_over_time_peaks_where_the_plan_says(case):
    timeline = case.timeline
    rows = memory_over_time(timeline, case.costs)
    for memory in timeline.memory:
        row = rows[case.plan.devices.index(memory.device)]
        assert int(max(held for _, held in row)) == memory.peak_bytes
        assert [at for at, _ in row] == sorted(at for at, _ in row)
        if case.known.training:
            assert row[-1][1] == pytest.approx(row[0][1])


@few
@given(priced_plans())
def test_simulation_is_repeatable(case):
    assert case.timeline == case.timeline


def test_reductions_come_last_and_show():
    plan = make_plan(1, [[0.5, 0.5]], num_microbatches=2)
    costs = uniform(plan, forward_s=1.0, backward_s=2.0, send_bytes=0.0)
    costs = costs._replace(reductions=(((0, 1), 1000.0),))
    timeline = simulate(plan, build_schedule(plan), costs, make_cluster(plan.devices), start_s=50.0)
    # Two rounds of half of 1000 bytes at 1000 bytes/s, after F and B.
    spans = [s for s in timeline.spans if s.lane == "network"]
    assert [(s.label, s.start_s, s.end_s) for s in spans] == [
        ("0REDUCE_GRAD", pytest.approx(53.0), pytest.approx(54.0))
    ] * 2
    assert timeline.makespan_s == pytest.approx(4)


def test_replica_without_work_reduces_from_the_start():
    plan = make_plan(1, [[0.5, 0.5]], num_microbatches=1)
    costs = uniform(plan, forward_s=1.0, backward_s=2.0, send_bytes=0.0)
    costs = costs._replace(reductions=(((0, 1), 1000.0),))
    timeline = simulate(plan, build_schedule(plan), costs, make_cluster(plan.devices), start_s=50.0)
    assert timeline.makespan_s == pytest.approx(4)
    reductions_of = [s for s in timeline.spans if s.label == "0REDUCE_GRAD" and s.rank == 1]
    assert [s.start_s for s in reductions_of] == [50.0]


def test_reductions_and_inputs_keep_their_tails_beside_given_transfers():
    """A schedule names messages between stages; the inputs that it can not name stay urgent."""
    plan = make_plan(2, [[1.0]] * 2, idle=1, num_microbatches=4, schedule_kind="wavefront")
    costs = uniform(plan, forward_s=1.0, backward_s=0.0, send_bytes=1000.0)
    costs = costs._replace(source=2, input_bytes=1000.0)
    cluster, schedule = make_cluster(plan.devices, "wifi"), build_schedule(plan)
    compiled = compile_step(plan, schedule, costs, cluster)
    tails = compiled.program.tails()
    transfers = tuple(
        Transfer(src=0, dst=1, num_bytes=1000, action=action, priority=tails[t])
        for t, action in compiled.sends.items()
    )
    named = simulate(plan, schedule.model_copy(update={"transfers": transfers}), costs, cluster)
    assert named == simulate(plan, schedule, costs, cluster)
