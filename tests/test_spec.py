import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from dora import files, spec
from dora.errors import SpecError
from dora.spec import (
    ACTION_KINDS,
    Action,
    Activity,
    BlockCost,
    BlockProfile,
    BoundaryCodec,
    Cluster,
    CodecRate,
    Cost,
    Decision,
    Device,
    DeviceMemory,
    Energy,
    Happening,
    Link,
    LinkStatus,
    Medium,
    ModelProfile,
    Overhead,
    Plan,
    PowerMode,
    QoE,
    Replica,
    Run,
    Schedule,
    Shares,
    Span,
    Stage,
    Status,
    TiedParameter,
    Timeline,
    Timing,
    TokenStatus,
    Traffic,
    Transfer,
    Usage,
    Workload,
    routes_from_shares,
)

names = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=8)
positive = st.floats(1e-12, 1e15)
non_negative = st.just(0.0) | positive
fractions = st.floats(0.001, 1.0)
counts = st.integers(1, 10**9)
num_bytes = st.integers(0, 2**40)
small = st.integers(0, 5)


def maybe(strategy):
    return st.none() | strategy


def tuples(strategy, min_size=0):
    return st.lists(strategy, min_size=min_size, max_size=3).map(tuple)


modes = st.builds(PowerMode, name=names, speed_factor=positive, power_factor=positive)


def devices(name=names):
    return st.builds(
        Device,
        name=name,
        kind=names,
        flops_per_s=positive,
        mem_bandwidth_bytes_per_s=positive,
        memory_bytes=counts,
        efficiency=fractions,
        mem_efficiency=fractions,
        thermal_factor=fractions,
        dispatch_s=non_negative,
        idle_w=non_negative,
        busy_w=non_negative,
        tx_j_per_byte=non_negative,
        rx_j_per_byte=non_negative,
        battery_j=maybe(positive),
        power_modes=tuples(modes),
    )


def media(name=names):
    return st.builds(
        Medium,
        name=name,
        rate_bytes_per_s=positive,
        latency_s=non_negative,
        contention=tuples(fractions, min_size=1),
    )


@st.composite
def clusters(draw):
    device_names = draw(st.lists(names, min_size=1, max_size=3, unique=True))
    media_names = draw(st.lists(names, min_size=1, max_size=3, unique=True))
    pairs = [(a, b) for a in device_names for b in device_names if a != b]
    chosen = draw(st.lists(st.sampled_from(pairs), unique=True, max_size=4)) if pairs else []
    used = tuples(st.sampled_from(media_names), min_size=1)
    return Cluster(
        name=draw(names),
        devices=tuple(draw(devices(st.just(name))) for name in device_names),
        media=tuple(draw(media(st.just(name))) for name in media_names),
        links=tuple(Link(src=a, dst=b, media=draw(used)) for a, b in chosen),
    )


timings = st.builds(Timing, device=names, forward_s=non_negative, backward_s=non_negative)


@st.composite
def block_profiles(draw):
    sizes = sorted(draw(st.sets(st.integers(1, 64), min_size=1, max_size=3)))
    param_bytes = draw(num_bytes)
    cost = st.builds(
        BlockCost,
        microbatch_size=st.just(1),
        flops=non_negative,
        traffic_bytes=num_bytes,
        num_ops=counts,
        activation_bytes=num_bytes,
        output_bytes=num_bytes,
        timings=tuples(timings),
    )
    return BlockProfile(
        name=draw(names),
        num_params=draw(num_bytes),
        param_bytes=param_bytes,
        trainable_bytes=draw(st.integers(0, param_bytes)),
        costs=tuple(draw(cost).model_copy(update={"microbatch_size": s}) for s in sizes),
    )


overheads = st.builds(
    Overhead,
    device=names,
    action_s=non_negative,
    message_s=non_negative,
    saved_s=non_negative,
    sprint=st.floats(1, 100),
)
codec_rates = st.builds(
    CodecRate,
    device=names,
    codec=names,
    encode_s_per_byte=non_negative,
    decode_s_per_byte=non_negative,
    call_s=non_negative,
)


@st.composite
def model_profiles(draw):
    blocks = draw(tuples(block_profiles(), min_size=1))
    index = st.integers(0, len(blocks) - 1)
    tied = st.builds(
        TiedParameter, name=names, blocks=st.tuples(index, index), param_bytes=num_bytes
    )
    return ModelProfile(
        name=draw(names),
        blocks=blocks,
        tied=draw(tuples(tied)),
        input_bytes=draw(num_bytes),
        codec_rates=draw(tuples(codec_rates)),
        overheads=draw(tuples(overheads)),
    )


@st.composite
def workloads(draw):
    batch = draw(st.integers(1, 1000))
    return Workload(
        kind=draw(st.sampled_from(["train", "infer", "generate"])),
        batch_size=batch,
        num_microbatches=draw(maybe(st.integers(1, batch))),
        optimizer_bytes_per_param=draw(non_negative),
        prompt_tokens=draw(small),
        new_tokens=draw(small),
    )


qoes = st.builds(
    QoE,
    latency_s=maybe(positive),
    step_s=maybe(positive),
    deadline_s=maybe(positive),
    frame_rate_hz=maybe(positive),
    ttft_s=maybe(positive),
    tpot_s=maybe(positive),
    percentile=st.floats(0.5, 99.5),
    energy_j=maybe(positive),
    power_w=maybe(positive),
    battery_j=maybe(positive),
    max_accuracy_loss=non_negative,
    objective=st.sampled_from(["time", "energy"]),
)
codec_names = st.sampled_from(["none", "int8", "int4", "int4-smooth", "fp8"])
costs = st.builds(
    Cost,
    makespan_s=non_negative,
    energy_j=non_negative,
    memory=tuples(st.builds(DeviceMemory, device=names, peak_bytes=num_bytes)),
)


@st.composite
def plans(draw):
    sizes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    device_names = draw(st.lists(names, min_size=sum(sizes), max_size=sum(sizes) + 2, unique=True))
    free, block, stages = iter(device_names), 0, []
    for index, size in enumerate(sizes):
        weights = draw(st.lists(st.integers(1, 5), min_size=size, max_size=size))
        replicas = tuple(
            Replica(device=next(free), share=w / sum(weights), power_mode=draw(names))
            for w in weights
        )
        last = block + draw(small)
        stages.append(Stage(index=index, first_block=block, last_block=last, replicas=replicas))
        block = last + 1
    codec = st.builds(BoundaryCodec, forward=codec_names, backward=codec_names)
    return Plan(
        devices=tuple(device_names),
        stages=tuple(stages),
        num_microbatches=draw(st.integers(1, 6)),
        codecs=tuple(draw(codec) for _ in sizes[1:]) if draw(st.booleans()) else (),
        gradient_codecs=tuple(draw(st.sampled_from(["none", "int8", "int4"])) for _ in sizes)
        if draw(st.booleans())
        else (),
        max_accuracy_loss=draw(maybe(non_negative)),
        schedule_kind=draw(st.sampled_from(["gpipe", "1f1b", "wavefront"])),
        cost=draw(maybe(costs)),
    )


@st.composite
def actions(draw):
    kind = draw(st.sampled_from(ACTION_KINDS))
    has_microbatch = kind not in ("REDUCE_GRAD", "OPT")
    return Action(draw(small), kind, draw(small) if has_microbatch else -1)


transfers = st.builds(
    Transfer,
    src=small,
    dst=small,
    num_bytes=num_bytes,
    action=actions(),
    priority=st.floats(-1e9, 1e9),
    chunk_bytes=maybe(counts),
    pace_bytes_per_s=maybe(positive),
    not_before_s=non_negative,
)
schedules = st.builds(
    Schedule, actions_by_rank=tuples(tuples(actions())), transfers=tuples(transfers)
)
provenances = st.sampled_from(["measured", "modelled from measured activity", "modelled", "none"])
timelines = st.builds(
    Timeline,
    source=st.sampled_from(["predicted", "measured"]),
    num_ranks=st.integers(1, 4),
    spans=tuples(
        st.builds(
            Span,
            rank=small,
            lane=st.sampled_from(["compute", "network", "wait"]),
            label=st.text(max_size=5),
            start_s=st.floats(0, 1e6),
            end_s=st.floats(0, 1e6),
        )
    ),
    energy=tuples(st.builds(Energy, device=names, joules=non_negative, provenance=provenances)),
)
decisions = st.builds(
    Decision,
    kind=st.sampled_from(["keep", "reschedule", "switch", "mix", "replan"]),
    reason=st.text(max_size=10),
    plans=plans().map(lambda plan: (plan,)),
    weights=tuples(fractions),
)

usages = st.builds(
    Usage,
    device=names,
    total_s=non_negative,
    busy_s=non_negative,
    sent_bytes=num_bytes,
    received_bytes=num_bytes,
    peak_bytes=num_bytes,
)


@st.composite
def traffic(draw):
    count = draw(small)
    at_s = sorted(draw(st.lists(non_negative, min_size=count, max_size=count)))
    carried = sorted(draw(st.lists(num_bytes, min_size=count, max_size=count)))
    rate = draw(positive)
    return Traffic(
        medium=draw(names),
        rate_bytes_per_s=rate,
        at_s=tuple(at_s),
        carried_bytes=tuple(carried),
    )


activities = st.builds(Activity, usage=tuples(usages), traffic=tuples(traffic()))
runs = st.builds(
    Run,
    name=names,
    cluster=clusters(),
    workload=workloads(),
    qoe=qoes,
    plan=plans(),
    front=tuples(plans()),
    predicted=maybe(timelines),
    measured=timelines,
    times_s=tuples(positive),
    window_s=maybe(st.tuples(non_negative, non_negative)),
    activity=maybe(activities),
    note=names,
)
link_statuses = st.builds(
    LinkStatus,
    peer=small,
    is_up=st.booleans(),
    sent_bytes=num_bytes,
    received_bytes=num_bytes,
    messages=small,
    rate_bytes_per_s=maybe(positive),
    round_trip_s=maybe(non_negative),
)
happenings = st.builds(
    Happening, at_s=non_negative, kind=names, devices=tuples(names), text=st.text(max_size=5)
)
shares = st.builds(
    Shares, computing=non_negative, waiting=non_negative, sending=maybe(non_negative)
)
latencies = maybe(st.tuples(non_negative, non_negative))
token_statuses = st.builds(
    TokenStatus,
    num_tokens=small,
    num_requests=small,
    in_flight=small,
    waiting=small,
    tokens_per_s=non_negative,
    first_s=latencies,
    further_s=latencies,
)
statuses = st.builds(
    Status,
    at_s=non_negative,
    period_s=positive,
    host=names,
    process=small,
    started_s=non_negative,
    rank=small,
    device=names,
    state=st.sampled_from(["running", "idle", "over", "failed"]),
    members=tuples(small),
    plan=plans(),
    predicted_s=maybe(non_negative),
    peak_bytes=maybe(num_bytes),
    kind=st.sampled_from(["train", "infer", "generate", None]),
    in_call_s=maybe(non_negative),
    recent_s=tuples(non_negative),
    calls_per_s=maybe(non_negative),
    shares=maybe(shares),
    tokens=maybe(token_statuses),
    bound_s=maybe(positive),
    links=tuples(link_statuses),
    events=tuples(happenings),
    num_events=st.dictionaries(names, small, max_size=2),
)

STRATEGIES = {
    PowerMode: modes,
    Device: devices(),
    Medium: media(),
    Link: st.builds(Link, src=names, dst=names, media=tuples(names, min_size=1)),
    Cluster: clusters(),
    Timing: timings,
    BlockCost: block_profiles().map(lambda block: block.costs[0]),
    BlockProfile: block_profiles(),
    TiedParameter: st.builds(
        TiedParameter, name=names, blocks=st.tuples(small, small), param_bytes=num_bytes
    ),
    CodecRate: codec_rates,
    Overhead: overheads,
    ModelProfile: model_profiles(),
    Workload: workloads(),
    QoE: qoes,
    Replica: st.builds(Replica, device=names, share=fractions, power_mode=names),
    Stage: plans().map(lambda plan: plan.stages[0]),
    BoundaryCodec: st.builds(BoundaryCodec, forward=codec_names, backward=codec_names),
    DeviceMemory: st.builds(DeviceMemory, device=names, peak_bytes=num_bytes),
    Cost: costs,
    Plan: plans(),
    Transfer: transfers,
    Schedule: schedules,
    Span: timelines.filter(lambda t: t.spans).map(lambda t: t.spans[0]),
    Energy: st.builds(Energy, device=names, joules=non_negative, provenance=provenances),
    Timeline: timelines,
    Decision: decisions,
    Usage: usages,
    Traffic: traffic(),
    Activity: activities,
    Run: runs,
    LinkStatus: link_statuses,
    Happening: happenings,
    Shares: shares,
    TokenStatus: token_statuses,
    Status: statuses,
}


def test_every_type_has_a_strategy():
    types = {
        value
        for value in vars(spec).values()
        if isinstance(value, type) and issubclass(value, spec.Spec) and value is not spec.Spec
    }
    assert types == set(STRATEGIES)


few = settings(
    max_examples=10,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@pytest.mark.parametrize("cls", STRATEGIES, ids=lambda cls: cls.__name__)
@few
@given(data=st.data())
def test_json_load_dump_load_is_identity(cls, data):
    value = data.draw(STRATEGIES[cls])
    text = value.to_json()
    again = cls.from_json(text)
    assert again == value
    assert again.to_json() == text


@pytest.mark.parametrize("cls", [Cluster, QoE], ids=lambda cls: cls.__name__)
@few
@given(data=st.data())
def test_toml_load_dump_load_is_identity(cls, data, tmp_path):
    value = data.draw(STRATEGIES[cls])
    files.save(value, tmp_path / "a.toml")
    again = files.load(cls, tmp_path / "a.toml")
    assert again == value
    files.save(again, tmp_path / "b.toml")
    assert (tmp_path / "a.toml").read_bytes() == (tmp_path / "b.toml").read_bytes()


@few
@given(plan=plans())
def test_plan_file_round_trip(plan, tmp_path):
    files.save(plan, tmp_path / "plan.json")
    assert files.load(Plan, tmp_path / "plan.json") == plan
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


GOOD_QOE = {"schema": "QoE/1", "step_s": 1.0}


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("q.json", json.dumps(GOOD_QOE | {"step_s": -1}), "step_s: given -1, allowed: greater"),
        ("q.json", json.dumps(GOOD_QOE | {"step": 1}), "step: given an unknown field, allowed"),
        ("q.json", json.dumps(GOOD_QOE | {"objective": "fun"}), 'objective: given "fun", allowed'),
        ("q.json", json.dumps({"step_s": 1}), "schema: given None, allowed 'QoE/1'"),
        ("q.json", json.dumps({"schema": "QoE/9"}), "schema: given 'QoE/9', allowed 'QoE/1'"),
        ("q.json", "[1, 2]", "schema: given None, allowed 'QoE/1'"),
        ("q.json", "{", "Expecting property name"),
        ("q.json", "", "Expecting value"),
        ("q.json", '{"schema": "QoE/1", "step_s": NaN}', "step_s: given NaN, allowed"),
        ("q.toml", "step_s = 0", "step_s: given 0, allowed: greater than 0"),
        ("q.toml", "step_s = ", "not valid TOML"),
        ("q.toml", "step_s = 'a\\nb'", "step_s: given"),
        ("missing.toml", None, "can not be read: No such file"),
        ("q.json", b"\xff\xfe", "can not be read: not UTF-8"),
    ],
)
def test_bad_file_gives_one_line(tmp_path, name, content, expected):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SpecError) as error:
        files.load(QoE, path)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert expected in message
    assert "\n" not in message


BAD_PLANS = {
    "stages.0.replicas.0.share: given 2": {"share": 2},
    "shares of stage 0 sum to 0.5, not 1": {"share": 0.5},
    "stage names device 'b', not in": {"device": "b"},
}


@pytest.mark.parametrize("expected", BAD_PLANS)
def test_bad_plan_gives_one_line(tmp_path, expected):
    replica = {"device": "a", "share": 1.0} | BAD_PLANS[expected]
    stage = {"index": 0, "first_block": 0, "last_block": 1, "replicas": [replica]}
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"schema": "Plan/1", "devices": ["a"], "stages": [stage]}))
    with pytest.raises(SpecError) as error:
        files.load(Plan, path)
    assert expected in str(error.value)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


def test_save_is_whole_or_nothing(tmp_path):
    path = tmp_path / "new" / "q.json"
    files.save(QoE(step_s=1), path)
    files.save(QoE(step_s=2), path)
    assert files.load(QoE, path).step_s == 2
    assert [p.name for p in path.parent.iterdir()] == ["q.json"]


@given(action=actions())
def test_action_from_str_is_the_inverse_of_str(action):
    assert Action.from_str(str(action)) == action
    assert repr(action) == str(action)


@pytest.mark.parametrize("text", ["", "F0", "0X1", "0F", "0OPT1", "0REDUCE_GRAD2", "-1F0", "0F0 "])
def test_text_that_is_no_action(text):
    with pytest.raises(ValueError, match="not an action"):
        Action.from_str(text)


@given(
    weights=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=1, max_size=3),
    n=st.integers(1, 40),
)
def test_route_counts_match_shares_within_one(weights, n):
    shares = [[w / sum(stage) for w in stage] for stage in weights]
    routes = routes_from_shares(shares, n)
    assert len(routes) == n
    for s, stage in enumerate(shares):
        for r, share in enumerate(stage):
            count = sum(route[s] == r for route in routes)
            assert abs(count - share * n) <= 1


@given(given_counts=st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_route_counts_are_exact_for_whole_numbers(given_counts):
    n = sum(given_counts)
    routes = routes_from_shares([[count / n for count in given_counts]], n)
    assert [sum(route[0] == r for route in routes) for r in range(len(given_counts))] == (
        given_counts
    )


def test_routes_interleave():
    assert routes_from_shares([[0.75, 0.25]], 4) == ((0,), (0,), (1,), (0,))


def test_plan_fills_routes_and_warmup():
    replicas = (Replica(device="a", share=0.5), Replica(device="b", share=0.5))
    stages = (
        Stage(index=0, first_block=0, last_block=0, replicas=replicas),
        Stage(index=1, first_block=1, last_block=2, replicas=(Replica(device="c"),)),
    )
    plan = Plan(devices=("a", "b", "c", "d"), stages=stages, num_microbatches=3)
    assert plan.warmup == (3, 1)
    assert plan.routes == ((0, 0), (1, 0), (0, 0))
    assert plan.placement(2) == (1, 0)
    assert plan.placement(3) is None
    assert plan.ranks(0) == (0, 1)


def test_specs_are_frozen():
    with pytest.raises(ValidationError):
        QoE(step_s=1).step_s = 2


def test_timeline_measures():
    spans = (
        Span(rank=0, lane="compute", label="F", start_s=0, end_s=1),
        Span(rank=0, lane="network", label="S", start_s=0.5, end_s=2),
        Span(rank=1, lane="compute", label="F", start_s=2, end_s=4),
    )
    timeline = Timeline(source="measured", num_ranks=2, spans=spans)
    assert timeline.makespan_s == 4
    assert timeline.bubble_ratio == pytest.approx(1 - 3 / 8)
    assert timeline.exposed_comm_s == pytest.approx(0.5)
