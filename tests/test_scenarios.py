from pathlib import Path

import pytest

from dora import catalog
from dora.errors import SpecError

NAMES = catalog.scenario_names()
REAL_BOUNDS = {
    "train": {"step_s"},
    "infer": {"latency_s", "frame_rate_hz"},
    "generate": {"ttft_s", "tpot_s"},
}
FOLDER = Path(catalog.__file__).parent / "scenarios"


def test_the_five_scenarios_are_there():
    assert set(NAMES) == {"smart-home-1", "smart-home-2", "traffic", "edge-cluster", "campus"}
    assert len(list(FOLDER.glob("*.toml"))) == 2 * len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_cluster_is_whole(name):
    scenario = catalog.scenario(name)
    devices = scenario.cluster.devices
    assert scenario.cluster.name == scenario.name == name
    assert len(scenario.cluster.links) == len(devices) * (len(devices) - 1)
    for device in devices:
        assert device.tx_j_per_byte > 0
        for mode in device.power_modes:
            assert 0 < mode.speed_factor < 1
            assert 0 < mode.power_factor < 1
        if "jetson" in device.kind or device.kind == "phone":
            assert device.memory_bytes < 64e9


def test_phones_and_boards_keep_memory_for_their_system():
    full = {catalog.device(name).memory_bytes for name in catalog.device_names()}
    for name in NAMES:
        assert not [d for d in catalog.scenario(name).cluster.devices if d.memory_bytes in full]


@pytest.mark.parametrize("name", NAMES)
def test_cells_say_what_is_bounded(name):
    scenario = catalog.scenario(name)
    devices = {d.name for d in scenario.cluster.devices}
    for cell in scenario.cells:
        kind, given = cell.workload.kind, cell.qoe.model_dump(exclude_none=True)
        assert REAL_BOUNDS[kind] & set(given), "a bound that the user would notice"
        for other in set(REAL_BOUNDS) - {kind}:
            assert not REAL_BOUNDS[other] & set(given)
        assert cell.workload.source is None or cell.workload.source in devices
        assert (kind == "generate") == (cell.workload.new_tokens > 0)
    assert {"train", "infer"} <= {cell.workload.kind for cell in scenario.cells}
    assert len(set(scenario.cells)) == len(scenario.cells)


@pytest.mark.parametrize("name", NAMES)
def test_every_cell_gives_a_profile_with_times_on_every_device(name):
    scenario = catalog.scenario(name)
    devices = {d.name for d in scenario.cluster.devices}
    for cell in scenario.cells:
        profile = catalog.cell_profile(cell, scenario.cluster)
        training = cell.workload.kind == "train"
        for cost in (cost for block in profile.blocks for cost in block.costs):
            assert {t.device for t in cost.timings} == devices
            assert all(t.forward_s > 0 and (t.backward_s > 0) == training for t in cost.timings)
        sizes = [cost.microbatch_size for cost in profile.blocks[0].costs]
        wanted = cell.workload.prompt_tokens or cell.workload.batch_size
        assert sizes[0] == 1
        assert wanted in sizes


def test_crossings_of_shared_channels():
    two = {(k.src, k.dst): k.media for k in catalog.scenario("smart-home-2").cluster.links}
    assert two["phone", "laptop"] == ("wifi", "wifi")
    assert two["phone", "hub"] == ("wifi", "hub.down")
    assert two["hub", "mac-mini"] == ("hub.up", "mac-mini.down")
    campus = catalog.scenario("campus").cluster
    links = {(k.src, k.dst): k.media for k in campus.links}
    assert len(campus.devices) == 40
    assert links["cafe-phone-0", "dorm-desktop-0"] == (
        "cafe",
        "library-uplink.up",
        "dorm-uplink.down",
        "dorm-desktop-0.down",
    )


def test_frames_come_from_cameras():
    cells = catalog.scenario("traffic").cells
    assert all(c.workload.source.startswith("camera-") for c in cells)
    assert all(c.qoe.frame_rate_hz for c in cells if c.workload.kind == "infer")


def test_unknown_scenario_lists_the_closest():
    with pytest.raises(SpecError, match="smart-home-1"):
        catalog.scenario("smart-home")
