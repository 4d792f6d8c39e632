import datetime
import json
import os
import random
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from dora import files
from dora.errors import PartitionError, PeerLostError, SpecError
from dora.partition import partition
from dora.profiler import (
    FlowRate,
    LinkRate,
    contention,
    load_profiles,
    measure_concurrent,
    measure_links,
    merge_profiles,
    parallelism,
    profile_model,
    resize_batch,
    to_cluster,
)
from dora.spec import Cluster, Device, ModelProfile

WIDTHS = (8, 16, 32, 4)


def mlp():
    layers = []
    for a, b in zip(WIDTHS, WIDTHS[1:], strict=False):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def profile(model, *args, sizes=(1, 2), **options):
    options = {"device_name": "here", "repeats": 2, "warmup": 1, **options}
    chain = partition(model, args)
    return profile_model(chain, args, microbatch_sizes=sizes, **options)


class TiedModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


# ---------------------------------------------------------------- compute


def test_profile_counts_of_mlp_are_exact():
    result = profile(mlp(), torch.randn(3, 8), sizes=(1, 2, 5))
    assert len(result.blocks) == 3
    assert (result.input_bytes, result.dtype) == (8 * 4, "float32")
    for block, a, b in zip(result.blocks, WIDTHS, WIDTHS[1:], strict=False):
        assert block.num_params == a * b + b
        assert block.param_bytes == block.trainable_bytes == 4 * (a * b + b)
        assert [cost.microbatch_size for cost in block.costs] == [1, 2, 5]
        for cost in block.costs:
            n = cost.microbatch_size
            assert cost.flops == 2 * n * a * b
            assert cost.output_bytes == 4 * n * b
            (timing,) = cost.timings
            assert timing.device == "here"
            assert timing.forward_s > 0
            assert timing.backward_s > 0


def test_profile_traffic_counts_each_operation_but_no_view():
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4, bias=False))
    first, second = profile(model, torch.randn(2, 8), sizes=(2,)).blocks
    assert first.costs[0].num_ops == second.costs[0].num_ops == 1
    # addmm reads bias, input and weight and writes the output; the transpose moves nothing.
    assert first.costs[0].traffic_bytes == 4 * (16 + 2 * 8 + 8 * 16 + 2 * 16)
    assert second.costs[0].traffic_bytes == 4 * (2 * 16 + 16 * 4 + 2 * 4)


def test_profile_activations_are_what_each_block_keeps():
    x = torch.randn(4, 8)
    first, second, third = profile(mlp(), x, sizes=(4,)).blocks
    # Input of the linear layer; the ReLU's output is kept by the block that receives it.
    assert first.costs[0].activation_bytes == 4 * 4 * 8
    assert second.costs[0].activation_bytes == 4 * 4 * 16
    assert third.costs[0].activation_bytes == 4 * 4 * 32


def test_profile_activations_between_operations_count_once():
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 16), nn.Sigmoid(), nn.Linear(16, 4)))
    chain = partition(model, (torch.randn(2, 8),), blocks=("0",))
    whole = profile_model(
        chain, (torch.randn(2, 8),), device_name="here", microbatch_sizes=(2,), repeats=1
    )
    # Sigmoid and the next layer both save the sigmoid's output: one storage.
    assert sum(block.costs[0].activation_bytes for block in whole.blocks) == 4 * 2 * (8 + 16)


def test_profile_costs_scale_with_microbatch_size():
    result = profile(TiedModel(), torch.zeros(2, 5, dtype=torch.long), sizes=(4, 1, 2))
    for block in result.blocks:
        one, two, four = block.costs
        for field in ("flops", "output_bytes", "activation_bytes"):
            assert getattr(two, field) == 2 * getattr(one, field)
            assert getattr(four, field) == 4 * getattr(one, field)
        assert one.num_ops == four.num_ops


def test_profile_embedding_reads_rows_and_not_the_table():
    model = nn.Sequential(nn.Embedding(10_000, 4), nn.Linear(4, 2))
    first = profile(model, torch.zeros(1, 3, dtype=torch.long), sizes=(1,)).blocks[0]
    assert first.costs[0].traffic_bytes == 3 * 8 + 2 * 3 * 4 * 4


def test_profile_tied_parameter_counts_in_both_blocks():
    result = profile(TiedModel(), torch.zeros(1, 5, dtype=torch.long), sizes=(1,))
    (tied,) = result.tied
    assert (tied.name, tied.blocks) == ("embed.weight", (0, len(result.blocks) - 1))
    assert tied.param_bytes == 4 * 11 * 6
    assert result.blocks[0].param_bytes == result.blocks[-1].param_bytes == tied.param_bytes


def test_profile_frozen_parameters_are_not_trainable():
    model = mlp()
    model[0].requires_grad_(False)
    model[2].weight.requires_grad_(False)
    first, second, third = profile(model, torch.randn(2, 8), sizes=(2,)).blocks
    assert (first.trainable_bytes, second.trainable_bytes) == (0, 4 * 32)
    assert third.trainable_bytes == third.param_bytes
    assert first.costs[0].timings[0].backward_s == 0
    assert second.costs[0].timings[0].backward_s > 0


def test_profile_whole_model_frozen_has_no_backward():
    result = profile(mlp().requires_grad_(False), torch.randn(2, 8), sizes=(2,))
    assert all(block.costs[0].timings[0].backward_s == 0 for block in result.blocks)


def test_profile_gradients_cross_boundaries_as_in_the_plain_module():
    # The blocks' backwards run one by one: what reaches the first weight must be its gradient.
    model, x = mlp(), torch.randn(2, 8)
    seen = []
    model[0].weight.register_hook(lambda grad: seen.append(grad.clone()))
    profile(model, x, sizes=(2,))
    model(x).backward(torch.ones(2, 4))
    assert len(seen) > 3
    for grad in seen:
        torch.testing.assert_close(grad, seen[-1])


class _Awkward(nn.Module):
    """BatchNorm and dropout, in-place activations right after a boundary, nested boundaries."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(_AwkwardLayer() for _ in range(3))

    def forward(self, x, scale=None):
        state = {"x": x, "extra": (torch.arange(3), None)}
        for layer in self.layers:
            state = layer(state)
        return {"out": state["x"] if scale is None else state["x"] * scale}


class _AwkwardLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.act = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)

    def forward(self, state):
        x = self.drop(self.norm(self.linear(self.act(state["x"] * 1))))
        return {"x": self.act(x), "extra": state["extra"]}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", [True, False])
def test_profile_leaves_everything_as_it_was(training, mode):
    torch.manual_seed(0)
    model, x = _Awkward(), torch.randn(4, 6)
    model(x)["out"].sum().backward()
    model.layers[1].norm.weight.grad = None
    chain = partition(model, (x,))
    model.train(mode)
    model.layers[2].eval()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    grads = {
        name: (p.grad, p.grad.clone()) for name, p in model.named_parameters() if p.grad is not None
    }
    flags = {name: m.training for name, m in model.named_modules()}
    rng, python_rng, sample = torch.get_rng_state(), random.getstate(), x.clone()
    profile_model(
        chain, (x,), {"scale": torch.ones(4, 1)}, device_name="here",
        microbatch_sizes=(2, 3), repeats=1, warmup=1, training=training,
    )  # fmt: skip
    assert all(torch.equal(tensor, state[n]) for n, tensor in model.state_dict().items())
    assert {name: m.training for name, m in model.named_modules()} == flags
    assert torch.equal(torch.get_rng_state(), rng)
    assert random.getstate() == python_rng
    assert torch.equal(x, sample)
    assert x.grad is None
    for name, p in model.named_parameters():
        grad, value = grads.get(name, (None, None))
        assert p.grad is grad
        assert grad is None or torch.equal(grad, value)


def test_profile_restores_after_a_failure():
    model, x = _Awkward(), torch.randn(4, 6)
    chain = partition(model, (x,))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def fail(output, targets):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        profile_model(
            chain, (x,), device_name="here", microbatch_sizes=(2,), loss_fn=fail, targets=x
        )
    assert all(torch.equal(tensor, before[n]) for n, tensor in model.state_dict().items())
    assert torch.is_grad_enabled()


def test_profile_inference_has_no_backward_and_smaller_memory():
    x = torch.randn(4, 8)
    blocks = profile(mlp(), x, sizes=(4,), training=False).blocks
    assert all(block.costs[0].timings[0].backward_s == 0 for block in blocks)
    assert all(block.costs[0].timings[0].forward_s > 0 for block in blocks)
    # Received input, output of the linear layer, output of the ReLU.
    assert blocks[0].costs[0].activation_bytes == 4 * 4 * (8 + 16 + 16)
    assert blocks[2].costs[0].activation_bytes == 4 * 4 * (32 + 4)


def test_profile_inference_counts_inside_the_fused_encoder_layer():
    model = nn.Sequential(*(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in "ab"))
    x = torch.randn(1, 5, 8)
    infer = profile(model, x, sizes=(1,), training=False)
    train = profile(model, x, sizes=(1,))
    flops = [block.costs[0].flops for block in infer.blocks]
    assert flops == [block.costs[0].flops for block in train.blocks]
    # Projections and feed-forward, then query x key and scores x value for 5 tokens.
    assert flops == [2 * 5 * (4 * 8 * 8 + 2 * 8 * 16) + 2 * 2 * 5 * 5 * 8] * 2
    assert torch.backends.mha.get_fastpath_enabled()


def test_profile_loss_belongs_to_the_last_block():
    x, targets = torch.randn(4, 8), torch.zeros(4, dtype=torch.long)
    calls = []

    def loss_fn(output, target):
        calls.append((output.shape[0], target.shape[0]))
        return nn.functional.cross_entropy(output, target)

    plain = profile(mlp(), x, sizes=(2,)).blocks
    result = profile(mlp(), x, sizes=(2,), loss_fn=loss_fn, targets=targets).blocks
    assert set(calls) == {(2, 2)}
    assert result[-1].costs[0].num_ops > plain[-1].costs[0].num_ops
    assert result[-1].costs[0].output_bytes == 4 * 2 * 4
    assert result[0].costs[0].num_ops == plain[0].costs[0].num_ops


@pytest.mark.parametrize("training", [True, False])
def test_profile_reports_progress_up_to_the_total(training):
    seen = []
    profile(mlp(), torch.randn(2, 8), training=training, progress=lambda *args: seen.append(args))
    total = seen[-1][1]
    assert seen == [(i + 1, total) for i in range(total)]


def test_profile_autocast_weights_are_cast_in_every_pass():
    with torch.autocast("cpu", torch.bfloat16):
        result = profile(TiedModel(), torch.zeros(1, 5, dtype=torch.long), sizes=(1,))
    assert result.blocks[-1].costs[0].output_bytes == 2 * 5 * 11
    assert result.dtype == "float32"


class _GlueParameter(nn.Module):
    """Glue code that computes a trainable value for every block."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        scale = self.scale.exp()
        for layer in self.layers:
            x = layer(x) * scale
        return x


def test_profile_glue_value_shared_by_blocks():
    blocks = profile(_GlueParameter(), torch.randn(2, 4), sizes=(2,)).blocks
    assert all(block.costs[0].timings[0].backward_s > 0 for block in blocks)


class _SkippingChain:
    """A chain of two blocks whose module runs only one."""

    names = ("a", "b")

    def __init__(self, module):
        self.module = module

    def parameters_of(self, block):
        return {}

    def tied(self):
        return {}

    def on_boundary(self, callback):
        return torch.enable_grad()


def test_profile_skipped_block_is_an_error():
    with pytest.raises(PartitionError, match="only 1 of 2 blocks ran"):
        profile_model(_SkippingChain(mlp()), (torch.randn(1, 8),), device_name="here")


@pytest.mark.parametrize(
    "options",
    [{"sizes": ()}, {"sizes": (0, 1)}, {"repeats": 0}, {"warmup": -1}, {"targets": 1}],
)
def test_profile_bad_argument(options):
    with pytest.raises(SpecError, match="allowed"):
        profile(mlp(), torch.randn(2, 8), **options)


# ---------------------------------------------------------------- batches


def test_resize_batch_slices_and_tiles():
    x, mask = torch.arange(6).reshape(3, 2), torch.ones(3, 1, 5)
    other, flag = torch.zeros(4), True
    resized = resize_batch({"x": x, "mask": [mask], "other": other, "flag": flag}, 5)
    assert resized["x"].tolist() == [[0, 1], [2, 3], [4, 5], [0, 1], [2, 3]]
    assert resized["mask"][0].shape == (5, 1, 5)
    assert torch.equal(resized["other"], other)
    assert resized["flag"] is True
    assert resize_batch(x, 2).tolist() == [[0, 1], [2, 3]]


def test_resize_batch_other_dimension():
    x = torch.arange(6).reshape(2, 3)
    assert resize_batch((torch.tensor(1.0), x), 2, batch_dim=1)[1].tolist() == [[0, 1], [3, 4]]


@pytest.mark.parametrize(
    ("tree", "size"), [((), 1), ((torch.tensor(1),), 1), ((torch.ones(2),), 0)]
)
def test_resize_batch_without_batch(tree, size):
    with pytest.raises(SpecError, match="batch"):
        resize_batch(tree, size)


# ---------------------------------------------------------------- replay


def test_replay_merges_devices_from_files(tmp_path):
    x = torch.randn(2, 8)
    for device in ("laptop", "phone"):
        files.save(profile(mlp(), x, device_name=device), tmp_path / f"{device}.json")
    merged = load_profiles([tmp_path / "laptop.json", tmp_path / "phone.json"])
    for block in merged.blocks:
        for cost in block.costs:
            assert [timing.device for timing in cost.timings] == ["laptop", "phone"]
    phone = files.load(ModelProfile, tmp_path / "phone.json")
    assert merged.blocks[1].costs[1].timings[1] == phone.blocks[1].costs[1].timings[0]
    assert ModelProfile.from_json(merged.to_json()) == merged
    assert load_profiles([tmp_path / "phone.json"]) == phone


def test_replay_merge_takes_the_largest_activation():
    a = profile(mlp(), torch.randn(2, 8), sizes=(1,))
    body = a.model_dump()
    for block in body["blocks"]:
        block["costs"][0]["activation_bytes"] += 100
        block["costs"][0]["timings"][0]["device"] = "other"
    b = ModelProfile.model_validate(body)
    merged = merge_profiles([a, b])
    expected = [block.costs[0].activation_bytes + 100 for block in a.blocks]
    assert [block.costs[0].activation_bytes for block in merged.blocks] == expected
    assert ModelProfile.model_validate(merged.model_dump()) == merged


def test_replay_merge_names_what_differs():
    a = profile(mlp(), torch.randn(2, 8), sizes=(1,))
    with pytest.raises(SpecError, match="'here'.*one profile per device"):
        merge_profiles([a, a])
    with pytest.raises(SpecError, match=r"profiles\[1\].blocks \(how many\): given 1, allowed 3"):
        merge_profiles([a, a.model_copy(update={"blocks": a.blocks[:1]})])
    with pytest.raises(SpecError, match=r"blocks\[0\].costs\[0\].microbatch_size: given 2"):
        merge_profiles([a, profile(mlp(), torch.randn(2, 8), sizes=(2,), device_name="b")])
    with pytest.raises(SpecError, match=r"dtype: given 'bfloat16', allowed 'float32'"):
        merge_profiles([a, a.model_copy(update={"dtype": "bfloat16"})])
    with pytest.raises(SpecError, match="at least one"):
        merge_profiles([])


# ---------------------------------------------------------------- links


WORLD_SIZE = 3
DEVICES = [
    Device(name=name, flops_per_s=1e9, mem_bandwidth_bytes_per_s=1e9, memory_bytes=1)
    for name in ("a", "b", "c")
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What each of three processes saw; one start for all tests, as importing torch is slow."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(_rank_main, (str(folder),), nprocs=WORLD_SIZE)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD_SIZE)]


def _rank_main(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=WORLD_SIZE,
        timeout=datetime.timedelta(seconds=30),
    )
    seen = {**_healthy(rank), "silent": _silent(rank)}
    Path(f"{folder}/{rank}.json").write_text(json.dumps(seen))
    dist.barrier()
    if rank < 2:
        seen["killed"] = _lost(
            lambda: measure_concurrent(None, [(0, 2), (1, 0)], duration_s=0.1, timeout_s=5)
        )
        Path(f"{folder}/{rank}.json").write_text(json.dumps(seen))
    os._exit(0)


def _healthy(rank):
    progress = []
    links = measure_links(
        dist.group.WORLD,
        sizes=(1 << 14, 1 << 18),
        repeats=3,
        progress=lambda *args: progress.append(args),
    )
    flows = measure_concurrent(None, [(0, 1), (1, 0), (2, 1)], duration_s=0.3)
    pair = dist.new_group([1, 2])
    of_pair = measure_links(pair, sizes=(1 << 10, 1 << 12), repeats=1) if rank else ()
    return {
        "cluster": to_cluster(DEVICES, links).to_json(),
        "flows": [flow.to_json() for flow in flows],
        "progress": progress,
        "pair": [(link.src, link.dst) for link in of_pair],
        "rejected": [
            _rejected(lambda flows=flows: measure_concurrent(None, flows))
            for flows in ([(0, 0)], [(0, 3)], [(0, 1), (0, 1)])
        ]
        + [
            _rejected(lambda options=options: measure_links(None, **options))
            for options in ({"sizes": (1,)}, {"repeats": 0}, {"timeout_s": 0})
        ],
    }


def _silent(rank):
    group = dist.new_group([0, 1, 2])
    lost = ["", 0.0] if rank == 2 else _lost(lambda: measure_links(group, timeout_s=0.5))
    # Stays alive, so that only the timeout can tell.
    dist.barrier()
    return lost


def _lost(call):
    start = time.monotonic()
    with pytest.raises(PeerLostError) as caught:
        call()
    return [str(caught.value), time.monotonic() - start]


def _rejected(call):
    with pytest.raises(SpecError) as caught:
        call()
    return str(caught.value)


@pytest.mark.timeout(60)
def test_links_are_the_same_on_every_rank(outcomes):
    for name in ("cluster", "flows"):
        assert outcomes[0][name] == outcomes[1][name] == outcomes[2][name]
    cluster = Cluster.from_json(outcomes[0]["cluster"])
    assert len(cluster.links) == len(cluster.media) == 6
    for src in "abc":
        for dst in set("abc") - {src}:
            rate, latency_s = cluster.path(src, dst)
            assert rate > 1e5
            assert 0 < latency_s < 1


@pytest.mark.timeout(60)
def test_links_report_progress(outcomes):
    for outcome in outcomes:
        assert outcome["progress"] == [[i + 1, 6] for i in range(6)]


@pytest.mark.timeout(60)
def test_links_of_a_subgroup_count_its_own_ranks(outcomes):
    assert [outcome["pair"] for outcome in outcomes] == [[], *[[[0, 1], [1, 0]]] * 2]


@pytest.mark.timeout(60)
def test_flows_run_at_once(outcomes):
    flows = [FlowRate.from_json(text) for text in outcomes[0]["flows"]]
    assert [(flow.src, flow.dst) for flow in flows] == [(0, 1), (1, 0), (2, 1)]


@pytest.mark.timeout(60)
def test_links_silent_rank_is_named_in_bounded_time(outcomes):
    (message, seconds), (other, other_seconds), _ = (outcome["silent"] for outcome in outcomes)
    assert message.startswith("rank 0: lost rank 2 while waiting for the start of link 0 -> 1")
    assert other.startswith("rank 1: lost rank 0 while waiting for the start of link 0 -> 1")
    assert max(seconds, other_seconds) < 5


@pytest.mark.timeout(60)
def test_flows_dead_rank_is_named(outcomes):
    assert outcomes[0]["killed"][0].startswith("rank 0: lost rank 2 while")
    assert outcomes[1]["killed"][0].startswith("rank 1: lost rank 0 while")


@pytest.mark.timeout(60)
def test_links_bad_argument(outcomes):
    rejected = outcomes[0]["rejected"]
    assert all("allowed" in message for message in rejected)
    assert [message.split(":")[0] for message in rejected[:3]] == ["flows"] * 3
    assert [message.split(":")[0] for message in rejected[3:]] == ["sizes, repeats, timeout_s"] * 3


def _rates(*rates):
    return [FlowRate(src=i, dst=i + 1, rate_bytes_per_s=rate) for i, rate in enumerate(rates)]


def test_contention_tells_shared_from_private_media():
    links = [LinkRate(src=i, dst=i + 1, rate_bytes_per_s=10, latency_s=0.1) for i in range(3)]
    assert parallelism(links, _rates(10, 10, 10)) == pytest.approx(3)
    assert parallelism(links, _rates(4, 4)) == pytest.approx(0.8)
    shared = contention(links, [_rates(4, 4), _rates(2, 2, 3)])
    assert shared == pytest.approx((1.0, 0.8, 0.7))
    assert contention(links, [_rates(9, 10)]) == (1.0, 1.0)
    with pytest.raises(SpecError, match="2, 3"):
        contention(links, [_rates(1, 1, 1)])
    with pytest.raises(SpecError, match="3 -> 4"):
        parallelism(links, _rates(1, 1, 1, 1))


def test_to_cluster_needs_a_device_per_rank():
    link = LinkRate(src=0, dst=1, rate_bytes_per_s=10, latency_s=0.1)
    device = Device(name="a", flops_per_s=1, mem_bandwidth_bytes_per_s=1, memory_bytes=1)
    with pytest.raises(SpecError, match="0 -> 1"):
        to_cluster([device], [link])
