import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dora import catalog
from dora.errors import SpecError
from dora.partition import partition
from dora.profiler import profile_model
from dora.spec import BlockProfile, ModelProfile

# (parameters, multiply-adds of one sample), as published: MobileNetV2 2018 table 4; torchvision's
# model pages for ResNet-50 and ViT-B/16; MobileBERT 2020 table 4, in FLOPs; model cards of Qwen3.
PUBLISHED = {
    "mobilenet-v2": (3.50e6, 0.300e9),
    "resnet-50": (25.56e6, 4.09e9),
    "vit-base": (86.57e6, 17.56e9),
    "bert-base": (109.5e6, 22.5e9 / 2),
    "qwen3-0.6b": (596.0e6, None),
    "qwen3-1.7b": (1.72e9, None),
    "qwen3-4b": (4.02e9, None),
}
# Measured on a Jetson AGX Orin at MAXN: (model, batch, TFLOP/s). PyTorch, sum over operations;
# branes-ai/graphs (b6c5e829).
ANCHORS = [
    ("resnet-50", 1, 0.26),
    ("resnet-50", 16, 2.15),
    ("vit-base", 1, 0.58),
    ("mobilenet-v2", 1, 0.03),
    ("mobilenet-v2", 64, 0.48),
]
KINDS = ("train", "infer", "generate")
FIELDS = ("flops", "traffic_bytes", "activation_bytes", "output_bytes", "num_ops")


def kinds_of(name: str) -> tuple[str, ...]:
    return KINDS if name.startswith("qwen") else KINDS[:2]


CASES = [(name, kind) for name in PUBLISHED for kind in kinds_of(name)]


def num_params(profile: ModelProfile) -> int:
    """Returns the parameters of a model, shared ones once."""
    width = profile.blocks[0].param_bytes // profile.blocks[0].num_params
    again = sum(t.param_bytes * (len(t.blocks) - 1) for t in profile.tied)
    return sum(b.num_params for b in profile.blocks) - again // width


def total(profile: ModelProfile, field: str, row: int = 0) -> float:
    return sum(getattr(b.costs[row], field) for b in profile.blocks)


def test_published_models_are_all_there():
    assert set(catalog.model_names()) == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_flops_are_the_published_ones(name):
    params, multiply_adds = PUBLISHED[name]
    profile = catalog.model_profile(name, kind="infer", microbatch_sizes=(1,))
    assert num_params(profile) == pytest.approx(params, rel=0.005)
    if multiply_adds is not None:
        assert total(profile, "flops") == pytest.approx(2 * multiply_adds, rel=0.02)


def test_one_token_reads_every_weight_and_multiplies_it_once():
    for name in catalog.model_names():
        if "generate" in kinds_of(name):
            profile = catalog.model_profile(name, kind="generate", microbatch_sizes=(1,))
            assert total(profile, "flops") == pytest.approx(2 * num_params(profile), rel=0.01)
            assert profile.blocks[0].costs[0].traffic_bytes < profile.blocks[0].param_bytes / 1000
            weights = num_params(profile) * 2
            assert weights < total(profile, "traffic_bytes") < 1.02 * weights


def modules() -> dict[str, nn.Module]:
    """Returns the models from their configuration alone, without memory for their weights."""
    transformers = pytest.importorskip("transformers")
    qwen = transformers.Qwen3Config
    tied = {"vocab_size": 151936, "head_dim": 128, "tie_word_embeddings": True}
    heads = {"num_key_value_heads": 8, **tied}
    small = {"num_hidden_layers": 28, "num_attention_heads": 16, **heads}
    large = {"num_hidden_layers": 36, "num_attention_heads": 32, **heads}
    configs = {
        "mobilenet-v2": transformers.MobileNetV2Config(num_labels=1000),
        "resnet-50": transformers.ResNetConfig(num_labels=1000),
        "vit-base": transformers.ViTConfig(num_labels=1000),
        "bert-base": transformers.BertConfig(num_labels=2),
        "qwen3-0.6b": qwen(hidden_size=1024, intermediate_size=3072, **small),
        "qwen3-1.7b": qwen(hidden_size=2048, intermediate_size=6144, **small),
        "qwen3-4b": qwen(hidden_size=2560, intermediate_size=9728, **large),
    }
    kinds = {
        "mobilenet-v2": transformers.MobileNetV2ForImageClassification,
        "resnet-50": transformers.ResNetForImageClassification,
        "vit-base": transformers.ViTForImageClassification,
        "bert-base": transformers.BertForSequenceClassification,
    }
    with torch.device("meta"):
        return {
            name: kinds.get(name, transformers.Qwen3ForCausalLM)(config)
            for name, config in configs.items()
        }


def test_parameters_are_those_of_the_real_modules():
    for name, module in modules().items():
        profile = catalog.model_profile(name, microbatch_sizes=(1,))
        assert num_params(profile) == sum(p.numel() for p in module.parameters()), name


def measured_layer(module: nn.Module, x: torch.Tensor, training: bool) -> BlockProfile:
    """Returns the profiler's view of the second block, the first layer."""
    chain = partition(module.train(training), (x,))
    profile = profile_model(
        chain,
        (x,),
        device_name="cpu",
        microbatch_sizes=(1,),
        training=training,
        warmup=0,
        repeats=1,
    )
    return profile.blocks[1]


def two_layers(name: str) -> tuple[nn.Module, torch.Tensor]:
    """Returns a model of two layers, each as wide as the catalogue's, and a sample."""
    transformers = pytest.importorskip("transformers")
    short = {"num_hidden_layers": 2, "vocab_size": 99}
    if name == "bert-base":
        config = transformers.BertConfig(**short, hidden_dropout_prob=0.0)
        config.attention_probs_dropout_prob = 0.0  # with it, attention on a CPU is not fused
        module = transformers.BertForSequenceClassification(config)
        return module, torch.randint(0, 99, (1, 128))
    if name == "vit-base":
        config = transformers.ViTConfig(num_hidden_layers=2)
        return transformers.ViTForImageClassification(config), torch.randn(1, 3, 224, 224)
    heads = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
    config = transformers.Qwen3Config(
        hidden_size=1024, intermediate_size=3072, use_cache=False, **heads, **short
    )
    return transformers.Qwen3ForCausalLM(config), torch.randint(0, 99, (1, 256))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("vit-base", "infer"),
        ("vit-base", "train"),
        ("bert-base", "infer"),
        ("bert-base", "train"),
        pytest.param("qwen3-0.6b", "infer", marks=pytest.mark.slow),
        pytest.param("qwen3-0.6b", "train", marks=pytest.mark.slow),
    ],
)
def test_layer_costs_what_the_profiler_counts(name, kind):
    block = catalog.model_profile(name, kind=kind, microbatch_sizes=(1,)).blocks[1]
    module, x = two_layers(name)
    is_bfloat16 = block.param_bytes < 4 * block.num_params
    real = measured_layer(module.bfloat16() if is_bfloat16 else module, x, kind == "train")
    ours, theirs = block.costs[0], real.costs[0]
    assert block.num_params == real.num_params
    assert ours.flops == theirs.flops
    assert ours.output_bytes == theirs.output_bytes
    # BERT's dropout is counted although it is off here; Qwen3's first layer makes the mask.
    assert ours.num_ops == pytest.approx(theirs.num_ops, rel=0.3)
    assert ours.traffic_bytes == pytest.approx(theirs.traffic_bytes, rel=0.25)
    slack = 0.1 if kind == "train" else 0.25  # peaks depend on when names go away
    assert ours.activation_bytes == pytest.approx(theirs.activation_bytes, rel=slack)


@pytest.mark.slow
def test_resnet_costs_what_the_profiler_counts():
    transformers = pytest.importorskip("transformers")
    module = transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=1000))
    x = torch.randn(1, 3, 224, 224)
    real = profile_model(
        partition(module, (x,)),
        (x,),
        device_name="cpu",
        microbatch_sizes=(1,),
        warmup=0,
        repeats=1,
    )
    ours = catalog.model_profile("resnet-50", microbatch_sizes=(1,))
    assert total(ours, "flops") == total(real, "flops")
    for field, rel in (("traffic_bytes", 0.02), ("activation_bytes", 0.02), ("num_ops", 0.05)):
        assert total(ours, field) == pytest.approx(total(real, field), rel=rel)


@given(
    case=st.sampled_from(CASES),
    sizes=st.lists(st.integers(1, 600), min_size=2, max_size=3, unique=True),
)
def test_more_samples_cost_more(case, sizes):
    name, kind = case
    profile = catalog.model_profile(name, kind=kind, microbatch_sizes=sizes)
    for block in profile.blocks:
        assert [c.microbatch_size for c in block.costs] == sorted(sizes)
        for small, large in zip(block.costs, block.costs[1:], strict=False):
            assert all(getattr(small, f) <= getattr(large, f) for f in FIELDS)
            assert small.output_bytes < large.output_bytes


def test_attention_grows_with_the_square_of_the_tokens():
    sizes = (1, 256, 512, 1024)
    layer = catalog.model_profile("qwen3-0.6b", kind="generate", microbatch_sizes=sizes).blocks[1]
    one, *flops = (c.flops for c in layer.costs)
    square = [f - n * one for f, n in zip(flops, sizes[1:], strict=True)]
    assert square[1] / square[0] == pytest.approx(4, rel=0.02)
    assert square[2] / square[1] == pytest.approx(4, rel=0.02)


def test_generation_keeps_keys_and_values_and_sends_token_ids():
    profile = catalog.model_profile("qwen3-4b", kind="generate", microbatch_sizes=(1, 100))
    layers = profile.blocks[1:-1]
    # Keys and values of 8 heads of 128 numbers in bfloat16.
    assert all(b.costs[1].activation_bytes == 100 * 2 * 8 * 128 * 2 for b in layers)
    assert all(b.costs[1].output_bytes == 100 * 2560 * 2 for b in profile.blocks[:-1])
    assert profile.blocks[-1].costs[1].output_bytes == 400
    assert profile.input_bytes == 4
    assert profile.dtype == "bfloat16"


def test_head_shares_the_embedding():
    profile = catalog.model_profile("qwen3-1.7b", microbatch_sizes=(1,))
    (tied,) = profile.tied
    assert tied.blocks == (0, len(profile.blocks) - 1)
    assert tied.param_bytes == 151936 * 2048 * 4
    assert catalog.model_profile("bert-base").tied == ()


def test_training_state_does_not_depend_on_the_kind_of_run():
    for name in catalog.model_names():
        train = catalog.model_profile(name, kind="train", microbatch_sizes=(1,))
        infer = catalog.model_profile(name, kind="infer", microbatch_sizes=(1,))
        assert [b.num_params for b in train.blocks] == [b.num_params for b in infer.blocks]
        assert all(b.trainable_bytes == 4 * b.num_params for b in train.blocks)
        assert total(train, "activation_bytes") > 0


@pytest.mark.parametrize(("name", "batch", "tflops"), ANCHORS)
def test_roofline_of_real_models_is_within_a_factor_of_two(name, batch, tflops):
    orin = catalog.device("jetson-agx-orin-64gb-maxn")
    profile = catalog.model_profile(name, kind="infer", microbatch_sizes=(batch,))
    scaled = catalog.scale_profile(profile, orin, training=False)
    predicted_s = sum(b.costs[0].timings[0].forward_s for b in scaled.blocks)
    measured_s = total(profile, "flops") / (tflops * 1e12)
    assert 0.5 < predicted_s / measured_s < 2


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"name": "resnet"}, "allowed: like resnet-50"),
        ({"name": "vit-base", "kind": "generate"}, "allowed for vit-base: train, infer"),
        ({"name": "vit-base", "microbatch_sizes": ()}, "at least 1"),
        ({"name": "vit-base", "microbatch_sizes": (0, 1)}, "at least 1"),
    ],
)
def test_bad_arguments_are_explained(arguments, expected):
    with pytest.raises(SpecError) as error:
        catalog.model_profile(**arguments)
    assert expected in str(error.value)


def test_profiles_survive_json():
    profile = catalog.model_profile("qwen3-0.6b", kind="generate", microbatch_sizes=(1, 8))
    assert ModelProfile.from_json(profile.to_json()) == profile
