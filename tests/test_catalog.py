from pathlib import Path

import pytest

from dora import catalog, files
from dora.errors import SpecError
from dora.spec import BlockCost, BlockProfile, Cluster, Device, ModelProfile, Timing

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_every_catalogue_row_loads():
    devices = [catalog.device(name) for name in catalog.device_names()]
    assert len(devices) == 29
    assert all(d.busy_w > d.idle_w > 0 for d in devices)
    for name in catalog.network_names():
        assert catalog.medium("m", name).rate_bytes_per_s > 0


def test_device_units():
    orin = catalog.device("jetson-orin-nano-8gb-25w")
    assert orin.dispatch_s == pytest.approx(110e-6)
    assert orin.flops_per_s == 1.88e12
    assert orin.tx_j_per_byte == pytest.approx(3e-9 * 8)  # 3 nJ per bit on Wi-Fi 6
    phone = catalog.device("iphone-15-pro")
    assert phone.battery_j == pytest.approx(12.7 * 3600)
    assert phone.thermal_factor == 0.56


def test_wifi_contention_is_interpolated():
    contention = catalog.medium("wifi", "wifi6_80_2ss").contention
    assert contention[:6] == (1.0, 0.95, 0.91, 0.88, 0.86, 0.84)
    assert len(contention) == 32
    assert contention[-1] == 0.67
    assert catalog.medium("lan", "eth_1g").contention == (1.0,)


def test_latency_of_one_crossing():
    assert catalog.medium("wifi", "wifi6_80_2ss").latency_s == pytest.approx(1.5e-3)
    assert catalog.medium("port", "eth_1g").latency_s == pytest.approx(0.3e-3 / 4)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: catalog.device("rpi5"), "rpi5-8gb"),
        (lambda: catalog.device("jetson"), "jetson-"),
        (lambda: catalog.network("wifi6"), "wifi6_80_2ss"),
        (lambda: catalog.device("zzzzzz"), "allowed: jetson-nano-4gb, "),
    ],
)
def test_unknown_name_lists_the_closest(call, expected):
    with pytest.raises(SpecError) as error:
        call()
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


# (name, GFLOP of one sample, operations, batch, measured TFLOP/s) on a Jetson AGX Orin MAXN.
# FLOPs are twice the published multiply-adds, operations are counted layers, batch norms,
# activations and additions; MobileNetV2 moves about 134 MB per image through its layers.
ANCHORS = [
    ("resnet50", 8.2, 175, 0.0, 1, 0.26),
    ("resnet50", 8.2, 175, 0.0, 16, 2.15),
    ("vgg16", 31.0, 38, 0.0, 1, 1.85),
    ("vit_b", 35.0, 170, 0.0, 1, 0.58),
    ("mobilenet_v2", 0.6, 152, 0.134, 1, 0.03),
    ("mobilenet_v2", 0.6, 152, 0.134, 64, 0.48),
]


@pytest.mark.parametrize("anchor", ANCHORS, ids=lambda anchor: f"{anchor[0]}-{anchor[4]}")
def test_roofline_is_within_a_factor_of_two(anchor):
    _, gflop, num_ops, traffic_gb, batch, tflops = anchor
    orin = catalog.device("jetson-agx-orin-64gb-maxn")
    predicted_s = catalog.roofline_s(
        orin, flops=gflop * 1e9 * batch, traffic_bytes=traffic_gb * 1e9 * batch, num_ops=num_ops
    )
    measured_s = gflop * batch / (tflops * 1e3)
    assert 0.5 < predicted_s / measured_s < 2


def test_one_efficiency_number_is_off_by_eight():
    orin = catalog.device("jetson-agx-orin-64gb-maxn")
    batch_16 = 8.2e9 * 16 / 2.15e12
    batch_1 = 8.2e9 / 0.26e12
    rate = orin.efficiency * orin.flops_per_s
    assert 8.2e9 * 16 / rate / batch_16 == pytest.approx(1, rel=0.05)
    assert batch_1 / (8.2e9 / rate) > 8


def test_throttling_slows_arithmetic_only():
    phone = catalog.device("phone-sd8gen3-12gb")

    def ratio(flops: float, traffic_bytes: float) -> float:
        work = {"flops": flops, "traffic_bytes": traffic_bytes, "num_ops": 0}
        cold = catalog.roofline_s(phone, **work, sustained=False)
        return catalog.roofline_s(phone, **work) / cold

    assert ratio(1e12, 0) == pytest.approx(1 / 0.35)
    assert ratio(0, 1e9) == 1


def make_profile(**timings: float) -> ModelProfile:
    cost = BlockCost(
        microbatch_size=4,
        flops=2e9,
        num_ops=10,
        timings=tuple(Timing(device=d, forward_s=t) for d, t in timings.items()),
    )
    return ModelProfile(blocks=(BlockProfile(name="a", costs=(cost,)),))


def test_scale_profile_keeps_measured_times():
    device = Device(
        name="new",
        flops_per_s=1e12,
        mem_bandwidth_bytes_per_s=1e11,
        memory_bytes=1,
        dispatch_s=1e-4,
    )
    scaled = catalog.scale_profile(make_profile(old=1.0), device)
    old, new = scaled.blocks[0].costs[0].timings
    assert old.forward_s == 1.0
    assert new == Timing(device="new", forward_s=5e-3, backward_s=10e-3)
    assert catalog.scale_profile(scaled, device) == scaled
    inference = catalog.scale_profile(make_profile(), device, training=False)
    assert inference.blocks[0].costs[0].timings[0].backward_s == 0


@pytest.mark.parametrize("name", ["home", "traffic", "cluster"])
def test_example_connects_every_pair(name):
    cluster = catalog.load_cluster(EXAMPLES / f"{name}.toml")
    pairs = [(a.name, b.name) for a in cluster.devices for b in cluster.devices if a != b]
    assert all(cluster.path(*pair) for pair in pairs)
    scaled = catalog.scale_to_cluster(make_profile(), cluster)
    assert len(scaled.blocks[0].costs[0].timings) == len(cluster.devices)


def media_of(cluster: Cluster, src: str, dst: str) -> tuple[str, ...]:
    return next(k.media for k in cluster.links if (k.src, k.dst) == (src, dst))


def test_generated_links():
    home = catalog.load_cluster(EXAMPLES / "home.toml")
    assert media_of(home, "phone", "laptop") == ("wifi", "wifi")
    assert media_of(home, "phone", "desktop") == ("wifi", "desktop.down")
    assert media_of(home, "desktop", "phone") == ("desktop.up", "wifi")
    wired = catalog.load_cluster(EXAMPLES / "cluster.toml")
    assert media_of(wired, "agx", "nx") == ("agx.up", "nx.down")
    assert wired.path("agx", "nx") == pytest.approx((117.5e6, 0.15e-3))
    traffic = catalog.load_cluster(EXAMPLES / "traffic.toml")
    assert media_of(traffic, "camera-north", "cabinet-pc") == ("site", "cabinet-pc.down")
    assert media_of(traffic, "camera-north", "server") == ("site", "street.up", "server.down")
    assert traffic.path("cabinet-pc", "server")[0] == pytest.approx(72e6 / 8)
    assert traffic.path("server", "cabinet-pc")[0] == pytest.approx(94e6 / 8)


BY_HAND = """
[[network]]
name = "air"
rate_bytes_per_s = 1e6
latency_s = 0.01
[[network]]
name = "wire"
network = "eth_100m"
[[device]]
name = "a"
device = "rpi5-8gb"
network = ["air", "wire"]
memory_bytes = 1000
[[device]]
name = "b"
network = ["wire", "air"]
flops_per_s = 1e9
mem_bandwidth_bytes_per_s = 1e9
memory_bytes = 2000
[[device]]
name = "c"
device = "rpi4-8gb"
network = "air"
"""


def test_fields_by_hand_and_several_networks(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text(BY_HAND)
    cluster = catalog.load_cluster(path)
    assert cluster.device("a").memory_bytes == 1000
    assert cluster.device("b").flops_per_s == 1e9
    assert media_of(cluster, "a", "b") == ("a.up", "b.down")
    # a reaches the access point by cable, which saves one crossing of the channel.
    assert media_of(cluster, "a", "c") == ("a.up", "air")
    assert cluster.path("a", "c") == pytest.approx((1e6, 0.0101))


def test_explicit_link_overrides(tmp_path):
    path = tmp_path / "c.toml"
    cable = '[[medium]]\nname = "usb"\nrate_bytes_per_s = 3e8\n'
    link = '[[link]]\nsrc = "a"\ndst = "c"\nmedia = ["usb"]\n'
    path.write_text(BY_HAND + cable + link)
    cluster = catalog.load_cluster(path)
    assert cluster.path("a", "c") == (3e8, 0)
    assert media_of(cluster, "c", "a") == ("air", "a.down")


@pytest.mark.parametrize("suffix", ["toml", "json"])
def test_whole_cluster_loads_too(tmp_path, suffix):
    cluster = catalog.load_cluster(EXAMPLES / "home.toml")
    files.save(cluster, tmp_path / f"c.{suffix}")
    assert catalog.load_cluster(tmp_path / f"c.{suffix}") == cluster


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("rpi5-8gb", "rpi5-8g", "device a.device: given 'rpi5-8g', allowed: like rpi5-8gb"),
        ('network = "air"', 'network = "ari"', "device c.network: given 'ari', allowed: like air"),
        ("eth_100m", "eth_100", "network: given 'eth_100', allowed: like eth_100m"),
        ("memory_bytes = 1000", "memory = 1", "device a: memory: given an unknown field"),
        ("memory_bytes = 1000", "memory_bytes = -1", "device a: memory_bytes: given -1"),
        ("rate_bytes_per_s = 1e6", "", "network air: given neither network nor rate_bytes_per_s"),
        ('name = "c"', 'name = "b"', "device names must be unique, given twice: b"),
        ("latency_s = 0.01", "latency_s = 'x'", "network.0.latency_s: given"),
        ("[[network]]", "[[networks]]", "networks: given an unknown field"),
    ],
)
def test_bad_cluster_file_gives_one_line(tmp_path, old, new, expected):
    path = tmp_path / "bad.toml"
    assert old in BY_HAND
    path.write_text(BY_HAND.replace(old, new))
    with pytest.raises(SpecError) as error:
        catalog.load_cluster(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert expected in message
    assert "\n" not in message


def test_uplink_names_its_networks(tmp_path):
    path = tmp_path / "bad.toml"
    path.write_text(BY_HAND + '[[uplink]]\nname = "u"\nnetwork = "lte_4g"\nnetworks = ["wir"]\n')
    with pytest.raises(SpecError, match="uplink u.networks: given 'wir', allowed: like wire"):
        catalog.load_cluster(path)
