"""Compressed messages: every codec trains and infers, alike on all transports and in every run."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Case, Pair, make
from plans import make_plan
from ranks import outcomes, run_ranks
from test_planner import coded as coded_problem
from test_planner import make_cluster, make_device, make_profile, simulated
from test_transparency import grads, relative_error
from torch import nn

from dora import DoraParallel, partition
from dora.kernels import (
    TILE,
    Format,
    prefix_bytes,
    quantize_pack,
    tile_bytes,
    unpack_dequantize,
)
from dora.planner import plan, predict, recoded
from dora.planner.codecs import CODECS as COSTS
from dora.planner.codecs import boundary_codecs
from dora.profiler import measure_codecs, merge_profiles
from dora.runtime.batch import as_call
from dora.runtime.boundary import LeafSpec
from dora.runtime.coded_sum import CodedSum
from dora.runtime.compress import FORMATS, MIN_BYTES, PIECE, Arrival, Encoder, Sample, format_of
from dora.runtime.guard import CHECK_CALLS, PROBES, Codecs
from dora.runtime.priority import GRADIENT
from dora.runtime.tags import BACKWARD, FORWARD, first_tag, reduce_tag
from dora.runtime.transports import open_transport
from dora.spec import BoundaryCodec, CodecRate, Plan, QoE, Workload

pytestmark = pytest.mark.timeout(120)

WIDTH = 64
NUM_MICROBATCHES = 2
# Of these rows a micro-batch is just large enough to be worth a codec.
BATCH = NUM_MICROBATCHES * math.ceil(MIN_BYTES / 2 / WIDTH)
CODECS = ("int8", "fp8", "int4", "int4-smooth")


class Wide(nn.Module):
    """Passes dictionaries of tuples: two tensors, a count, and a mask of infinite values."""

    def __init__(self, outliers: float = 1.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Masked(WIDTH) for _ in range(4))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 5)
        scale = torch.ones(WIDTH)
        scale[3::32] = outliers
        self.register_buffer("scale", scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Without gradients nothing tells a mask from an activation.
        mask = torch.zeros(x.shape).masked_fill(x > 2, -torch.inf if self.training else -1.0)
        count = torch.zeros(x.shape[0], dtype=torch.long)
        state = {"a": x * self.scale, "rest": (x * 2, count), "mask": mask}
        for layer in self.layers:
            state = layer(state, self.scale)
        return self.head(self.norm(state["a"] / self.scale))


class Masked(Pair):
    def forward(self, state: dict[str, Any], scale: torch.Tensor) -> dict[str, Any]:
        a, rest = state["a"], state["rest"]
        after = super().forward({"a": a / scale, "rest": rest})
        kept = after["a"].masked_fill(state["mask"] < 0, 0.0)
        return {"a": kept * scale, "rest": after["rest"], "mask": state["mask"]}


def wide(outliers: float = 1.0) -> Case:
    torch.manual_seed(0)
    x, y = torch.randn(BATCH, WIDTH), torch.randint(0, 5, (BATCH,))
    return Case(Wide(outliers), x, y, F.cross_entropy)


def tied() -> Case:
    return make("tied", math.ceil(NUM_MICROBATCHES * MIN_BYTES / (10 * 16 * 4)))


def build(case: Case, shares: Any, fields: dict[str, Any], **options: Any) -> DoraParallel:
    args, kwargs = as_call(case.inputs)
    chain = partition(case.module, args, kwargs)
    plan = make_plan(chain.num_blocks, shares, num_microbatches=NUM_MICROBATCHES, **fields)
    return DoraParallel(chain, plan, seed=3, **options)


def both(name: str, boundaries: int = 1) -> dict[str, Any]:
    return {"codecs": (BoundaryCodec(forward=name, backward=name),) * boundaries}


def run(case: Case, shares: Any, fields: dict[str, Any], steps: int = 2, **options: Any) -> dict:
    """Trains a few steps and infers once; returns everything that could differ."""
    model = build(case, shares, fields, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        losses.append(float(model.step(case.inputs, case.targets, case.loss_fn)))
        optimizer.step()
    found: dict[str, Any] = {
        "loss": losses,
        "grad": {n: g.clone() for n, g in grads(model).items()},
    }
    model.eval()
    args, kwargs = as_call(case.inputs)
    with torch.no_grad():
        found["output"] = model(*args, **kwargs)
    return found


def same(a: dict, b: dict) -> bool:
    return (
        a["loss"] == b["loss"]
        and torch.equal(a["output"], b["output"])
        and all(torch.equal(x, b["grad"][name]) for name, x in a["grad"].items())
    )


def away(a: dict, b: dict) -> dict[str, float]:
    def relative(x: torch.Tensor, y: torch.Tensor) -> float:
        return float((x - y).norm() / y.norm())

    grad, plain = ([g.flatten() for g in found["grad"].values()] for found in (a, b))
    return {
        "loss": max(abs(x / y - 1) for x, y in zip(a["loss"], b["loss"], strict=True)),
        "grad": relative(torch.cat(grad), torch.cat(plain)),
        "output": relative(a["output"], b["output"]),
    }


# ---------------------------------------------------------------- one tensor


def leaf_of(x: torch.Tensor) -> LeafSpec:
    return LeafSpec(x.shape, x.dtype, x.device, requires_grad=True)


@settings(max_examples=20)
@given(
    codec=st.sampled_from(CODECS),
    is_gradient=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    numel=st.integers(1, 3 * PIECE),
    columns=st.sampled_from([WIDTH, 33, 192]),
)
def test_pieces_decode_to_what_the_whole_does(codec, is_gradient, dtype, numel, columns):
    rows = -(-numel // columns)
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to(dtype)
    format = format_of(codec, leaf_of(x), is_gradient=is_gradient)
    parts = list(Encoder("x", format, seed=5, is_gradient=is_gradient).parts(x))
    arrival = Arrival(leaf_of(x), format, torch.device("cpu"))
    assert [p.numel() for p in parts] == [p.numel() for p in arrival.parts]
    for i, part in enumerate(parts):
        arrival.parts[i].copy_(part)
        arrival.decode(i)
    if format is None:
        assert torch.equal(arrival.tensor, x)
        assert x.nbytes < MIN_BYTES
        return
    factors = parts[0].view(torch.bfloat16) if format.smooth else None
    whole = quantize_pack(x, format, seed=5, factors=factors)
    assert torch.equal(torch.cat(parts[format.smooth :]), whole)
    assert sum(p.numel() for p in parts) == whole.numel() + prefix_bytes(columns, format)
    expected = unpack_dequantize(whole, x.shape, dtype, format, factors=factors)
    assert torch.equal(arrival.tensor, expected)
    assert format.stochastic == (is_gradient and codec != "fp8")


def test_what_has_no_codec_goes_as_it_is():
    big = torch.zeros(MIN_BYTES)
    for x in (big.long(), big.double(), big[: MIN_BYTES // 4 - 1]):
        assert format_of("int8", leaf_of(x), is_gradient=False) is None
    assert format_of("none", leaf_of(big), is_gradient=False) is None
    odd = torch.zeros(MIN_BYTES, 63)
    assert format_of("int4-smooth", leaf_of(odd), is_gradient=False) == Format("int8")


def test_values_that_are_not_finite():
    x = torch.ones(MIN_BYTES)
    x[5] = torch.inf
    with pytest.raises(ValueError, match="tensor 0 of 1SEND_F2: given infinite"):
        list(Encoder("tensor 0 of 1SEND_F2", FORMATS["int8"]).parts(x))
    arrival = Arrival(leaf_of(x), FORMATS["int8"], torch.device("cpu"))
    encoder = Encoder("g", FORMATS["int8"], is_gradient=True)
    for i, part in enumerate(encoder.parts(x)):
        arrival.parts[i].copy_(part)
        arrival.decode(i)
    assert arrival.tensor[:PIECE].isnan().all(), "a gradient scaler must find it"


# ---------------------------------------------------------------- training and inference


def every_codec(rank: int) -> tuple[dict[str, dict[str, float]], list[str]]:
    errors, differing = {}, []
    shares = [[1], [1]]
    for kind, case, names in (("wide", wide, CODECS), ("tied", tied, ("int8",))):
        plain = run(case(), shares, {}, transport="gloo")
        for name in names:
            found = run(case(), shares, both(name), transport="gloo")
            errors[f"{kind} {name}"] = away(found, plain) if rank == 0 else {}
            again = {"int8": "dora", "int4": "gloo", "int4-smooth": "gloo-chunked"}
            if name in again:
                other = run(case(), shares, both(name), transport=again[name])
                if not same(found, other):
                    differing.append(f"{kind} {name} over {again[name]}")
    return errors, differing


# Of gradients, after codes of activations and of gradients.
ALLOWED = {"int8": 0.05, "fp8": 0.15, "int4": 0.4, "int4-smooth": 0.4}


def test_every_codec_trains_and_infers_alike_on_all_transports():
    results = run_ranks(2, every_codec, timeout_s=110)
    for _, differing in results:
        assert not differing
    for name, errors in results[0][0].items():
        bound = ALLOWED[name.split()[1]]
        assert 0 < errors["grad"] < bound, (name, errors)
        assert 0 < errors["output"] < bound, (name, errors)
        assert errors["loss"] < bound / 5, (name, errors)


def with_autocast(rank: int) -> tuple[dict[str, float], list[str]]:
    with torch.autocast("cpu", torch.bfloat16):
        plain, coded, again = (
            run(wide(), [[1], [1]], fields) for fields in ({}, both("int8"), both("int8"))
        )
    return away(coded, plain), [] if same(coded, again) else ["again"]


def test_autocast_to_bf16():
    (_, differing), (errors, _) = run_ranks(2, with_autocast)
    assert not differing
    assert errors["loss"] < 0.01
    assert 0 < errors["grad"] < 0.1


# ---------------------------------------------------------------- sums of gradients


def replicas(rank: int) -> tuple[dict[str, float], bool, float]:
    shares, fields = [[1, 1]], {"gradient_codecs": ("int8",)}
    plain = run(wide(), shares, {}, transport="gloo")
    found = [run(wide(), shares, fields, transport=name) for name in ("gloo", "dora", "gloo")]
    first = torch.cat([g.flatten() for g in found[0]["grad"].values()])
    digest = float(first.double() @ torch.arange(first.numel(), dtype=torch.float64))
    return away(found[0], plain), all(same(found[0], one) for one in found[1:]), digest


def test_replicas_sum_codes_to_equal_gradients():
    (errors, is_same, one), (_, _, two) = run_ranks(2, replicas)
    assert is_same
    assert one == two, "replicas differ"
    assert 0 < errors["grad"] < 0.05
    assert errors["loss"] < 0.01


NUM_SUMS = 40


def long_sum(rank: int) -> dict[str, float]:
    """Sums the same vectors again and again; returns how far the mean of the sums is off."""
    transport = open_transport("gloo", timeout_s=20)
    vectors = torch.randn(3, 3 * TILE + 100, generator=torch.Generator().manual_seed(1))
    exact = vectors.sum(0)
    errors = {}
    for name in ("int8", "int4"):
        lost, total = torch.zeros(vectors.shape[1]), torch.zeros(vectors.shape[1])
        for step in range(NUM_SUMS):
            vector, flags = vectors[rank].clone(), torch.tensor([1.0, 0.0, float(rank == 2)])
            coded = CodedSum(
                transport,
                (0, 1, 2),
                rank,
                vector,
                flags,
                error=lost,
                format=FORMATS[name],
                seed=step,
                tag=100,
                priority=GRADIENT,
            )
            coded.pass_on(20)
            coded.wait(20)
            assert flags.tolist() == [3, 0, 1]
            total += vector
            if step == 0:
                errors[f"{name} once"] = float((vector - exact).norm() / exact.norm())
        errors[f"{name} mean"] = float((total / NUM_SUMS - exact).norm() / exact.norm())
        errors[f"{name} digest"] = float(total.double().square().sum())
    return errors


def test_error_feedback_makes_up_for_what_was_lost():
    one, two, three = run_ranks(3, long_sum)
    assert one == two == three
    for name, once in (("int8", 0.02), ("int4", 0.3)):
        assert one[f"{name} once"] < once
        # The second encoding is unbiased, not fed back: it falls with the root of the number.
        assert one[f"{name} mean"] < one[f"{name} once"] / math.sqrt(NUM_SUMS) * 1.5


def cut_on_the_way(rank: int) -> dict[int, list[tuple[int, int]]]:
    """Trains with long messages and sums codes; returns (offset, bytes) of what arrived, by tag."""
    torch.manual_seed(0)
    x, y = torch.randn(8192, WIDTH), torch.zeros(8192, dtype=torch.long)
    case = replace(wide(), inputs=x, targets=y)
    model = build(case, [[1], [1]], both("int8"), transport="dora")
    model.step(case.inputs, case.targets, case.loss_fn)
    vector, flags = torch.randn(200 * TILE), torch.ones(3)
    coded = CodedSum(
        model.transport,
        (0, 1),
        rank,
        vector,
        flags,
        error=torch.zeros(vector.numel()),
        format=FORMATS["int8"],
        seed=0,
        tag=reduce_tag(0),
        priority=GRADIENT,
    )
    coded.pass_on(20)
    coded.wait(20)
    found: dict[int, list[tuple[int, int]]] = {}
    for frame in model.transport.frames():
        if frame.kind == "data" and not frame.is_sent:
            found.setdefault(frame.tag, []).append((frame.offset, frame.length))
    return found


def test_messages_are_cut_between_tiles():
    for direction, found in zip((BACKWARD, FORWARD), run_ranks(2, cut_on_the_way), strict=True):
        tags = [first_tag(direction, m) for m in range(NUM_MICROBATCHES)]
        for tag in (*tags, reduce_tag(0), reduce_tag(0) + 1):
            assert len(found[tag]) > 1, "too short to be cut"
            assert all(offset % tile_bytes(FORMATS["int8"]) == 0 for offset, _ in found[tag])


# ---------------------------------------------------------------- the guard


def guarded(rank: int, codec: str, outliers: float, limit: float, steps: int) -> dict[str, Any]:
    """Trains under a limit; compares the gradients of the probes with those without codecs."""
    fields = {**both(codec), "max_accuracy_loss": limit}
    case = wide(outliers)
    model, plain = build(case, [[1], [1]], fields), build(wide(outliers), [[1], [1]], {})
    is_exact = []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(steps):
            for one in (model, plain):
                one.zero_grad()
                one.step(case.inputs, case.targets, case.loss_fn)
            is_exact.append(relative_error(grads(model), grads(plain)) == 0)
    state = model.codec_report.training
    with torch.no_grad():
        model.eval()
        model(case.inputs)
    return {
        "names": sorted(state.codecs.names),
        "loss": state.accuracy_loss,
        "refused": [(str(codecs), loss) for codecs, loss in state.refused],
        "text": str(state),
        "said": [str(w.message) for w in said],
        "exact": is_exact,
        "is_inference_measured": model.codec_report.inference.is_measuring,
    }


def test_codecs_within_the_limit_stay():
    one, two = run_ranks(2, guarded, "int8", 1.0, 0.01, PROBES + 1)
    assert one["names"] == two["names"] == ["int8"]
    assert not one["refused"]
    assert 0 < one["loss"] == two["loss"] <= 0.01
    assert one["text"] == f"int8/int8, loses {one['loss']:.2g} of 0.01"
    assert one["exact"][:PROBES] == [True] * PROBES, "a probe changes the user's gradients"
    assert not any(one["exact"][PROBES:])
    assert one["is_inference_measured"], "inference is judged by its own outputs"


def test_int4_is_refused_where_channels_stand_out():
    one, two = run_ranks(2, guarded, "int4", 50.0, 0.05, PROBES)
    assert one["refused"] == two["refused"]
    assert one["refused"][0][0] == "int4/int4"
    assert one["refused"][0][1] > 0.05
    assert "int4" not in one["names"]
    assert "lose" in one["said"][0]
    assert "int4-smooth/int4-smooth instead" in one["said"][0]
    assert "; refused: int4/int4 (" in one["text"]
    assert not two["said"], "every rank tells the user the same"


def drifting(rank: int) -> tuple[list[str], list[str]]:
    """The data grows outliers long after the probe."""
    case = wide()
    fields = {**both("int4"), "max_accuracy_loss": 0.2}
    model = build(case, [[1], [1]], fields)
    for _ in range(PROBES + 1):
        model.step(case.inputs, case.targets, case.loss_fn)
    before = sorted(model.codec_report.training.codecs.names)
    with torch.no_grad():
        model.module.get_buffer("scale")[3::32] = 100.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(CHECK_CALLS + PROBES):
            model.step(case.inputs, case.targets, case.loss_fn)
    return before, sorted(model.codec_report.training.codecs.names)


def test_growing_errors_are_measured_again():
    for before, after in run_ranks(2, drifting):
        assert before == ["int4"]
        assert "int4" not in after


def test_the_coarsest_codec_is_replaced_first():
    codecs = Codecs(
        (BoundaryCodec(forward="int4", backward="int8"), BoundaryCodec(forward="fp8")), ("int4",)
    )
    seen = [str(codecs)]
    while codecs.names:
        codecs = codecs.better()
        seen.append(str(codecs))
    assert seen == [
        "int4/int8 | fp8/none, gradients int4",
        "int4-smooth/int8 | fp8/none, gradients int8",
        "int8/int8 | fp8/none, gradients int8",
        "int8/int8 | int8/none, gradients int8",
        "none/none | none/none, gradients none",
    ]


def not_a_number(rank: int) -> None:
    case = wide()
    case.inputs[0, 0] = torch.nan
    build(case, [[1], [1]], both("int8")).step(case.inputs, case.targets, case.loss_fn)


def test_activations_that_are_not_finite_name_their_tensor():
    first, second = outcomes(2, not_a_number)
    assert isinstance(first.error, ValueError)
    assert "tensor 0 of 0SEND_F0: given infinite values or NaN" in str(first.error)
    assert "on rank 0: ValueError" in str(second.error)


# ---------------------------------------------------------------- plans


def test_errors_that_the_planner_counts_on_are_those_of_the_kernels():
    x = torch.randn(2048, 512, generator=torch.Generator().manual_seed(0))
    for name, cost in COSTS.items():
        for is_gradient in (False, True) if name != "none" else ():
            format = format_of(name, leaf_of(x), is_gradient=is_gradient)
            sample = Sample()
            list(Encoder("x", format, is_gradient=is_gradient, sample=sample).parts(x))
            expected = cost.gradient_error if is_gradient else cost.error
            assert sample.error == pytest.approx(expected, rel=0.02), name


def test_a_given_placement_gets_the_codecs_that_make_it_fastest():
    """No other choice of one codec for each of boundaries and sums is faster."""
    names = ("d0", "d1", "d2")
    devices = [make_device(name, memory_bytes=10**9) for name in names]
    profile = make_profile({name: [1.0] * 3 for name in names}, param_bytes=20_000)
    problem, work = (profile, make_cluster(devices, rate=1e3)), Workload(batch_size=4)
    bare = make_plan(3, [[1, 1], [1]], num_microbatches=4)
    for max_loss, names in ((0.0, ["none"]), (0.01, ["none", "int8"]), (0.03, ["none", "int4"])):
        found = recoded(*problem, work, bare, max_loss)
        assert found.stages == bare.stages
        assert found.max_accuracy_loss == (max_loss or None)
        assert predict(*problem, work, found).cost == found.cost
        for pair, total in product(names, names):
            fixed = {
                "codecs": (BoundaryCodec(forward=pair, backward=pair),),
                "gradient_codecs": (total, "none"),
            }
            other = predict(*problem, work, bare.model_copy(update=fixed))
            assert found.cost.makespan_s <= other.cost.makespan_s * 1.005


def test_of_codecs_that_take_as_long_the_one_that_loses_least_is_taken():
    profile, cluster, work = coded_problem(1e5)
    rates = [
        CodecRate(device=d, codec=name, encode_s_per_byte=s, decode_s_per_byte=s, call_s=0)
        for d in "ab"
        for name, s in (("int8", 2e-9), ("fp8", 1e-9))
    ]
    measured = profile.model_copy(update={"codec_rates": tuple(rates)})
    bare = plan(profile, cluster, work, QoE(max_accuracy_loss=0.01))[0]
    assert bare.codecs
    found = recoded(measured, cluster, work, bare, 0.01)
    assert {codec.forward for codec in found.codecs} == {"int8"}


def test_replicas_on_a_slow_link_sum_codes():
    devices = [make_device(name, memory_bytes=10**9, dispatch_s=1e-4) for name in "ab"]
    profile = make_profile(
        {"a": [1.0] * 2, "b": [1.0] * 2}, param_bytes=200_000, output_bytes=2_000_000
    )
    problem = profile, make_cluster(devices, rate=1e5)
    work = Workload(kind="train", batch_size=8, num_microbatches=8)
    plain = plan(*problem, work)[0]
    coded = plan(*problem, work, QoE(max_accuracy_loss=0.01))[0]
    assert not plain.gradient_codecs
    assert plain.max_accuracy_loss is None
    assert coded.gradient_codecs == ("int8",)
    assert coded.max_accuracy_loss == 0.01
    assert coded.cost.makespan_s < plain.cost.makespan_s - 2
    assert simulated(*problem, work, coded).makespan_s == pytest.approx(coded.cost.makespan_s)
    assert predict(*problem, work, coded).cost.makespan_s == pytest.approx(coded.cost.makespan_s)


def test_a_codec_that_a_device_is_slow_at_is_left_out():
    profile, cluster, work = coded_problem(1e5)
    rates = [
        CodecRate(device=d, codec=name, encode_s_per_byte=s, decode_s_per_byte=0, call_s=0)
        for d in "ab"
        for name, s in (("int8", 1e-3), ("fp8", 1e-9), ("int4", 1e-9))
    ]
    measured = profile.model_copy(update={"codec_rates": tuple(rates)})
    qoe = QoE(max_accuracy_loss=0.01)
    names = [
        {c.forward for c in plan(p, cluster, work, qoe)[0].codecs} for p in (profile, measured)
    ]
    assert names == [{"int8"}, {"fp8"}]


def test_gradients_get_a_better_codec_where_theirs_lose_too_much():
    both_ways = boundary_codecs(0.02, training=True)
    assert BoundaryCodec(forward="int4", backward="int8") in both_ways
    assert BoundaryCodec(forward="int4", backward="int4") in boundary_codecs(0.03, training=True)
    assert [c.forward for c in boundary_codecs(0.0, training=True)] == ["none"]


def test_plans_without_codecs_for_gradients_are_still_read():
    found = make_plan(2, [[1, 1]])
    old = json.loads(found.to_json())
    del old["gradient_codecs"]
    assert Plan.from_json(json.dumps(old)) == found
    with pytest.raises(ValueError, match="gradient_codecs: allowed 1"):
        make_plan(2, [[1, 1]], gradient_codecs=("int8", "int8"))


def test_rates_of_codecs_are_measured_and_kept_for_every_device():
    rates = measure_codecs("a", torch.device("cpu"))
    assert {rate.codec for rate in rates} == set(CODECS)
    assert all(rate.encode_s_per_byte > 0 and rate.call_s > 0 for rate in rates)
    times = {"a": [1.0], "b": [1.0]}
    parts = [
        make_profile({name: times[name]}).model_copy(
            update={"codec_rates": measure_codecs(name, torch.device("cpu"))[:1]}
        )
        for name in times
    ]
    assert [rate.device for rate in merge_profiles(parts).codec_rates] == ["a", "b"]
