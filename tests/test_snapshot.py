"""Snapshots give way to the steps that they are taken beside."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from ranks import run_ranks

from dora import _C
from dora.runtime.buckets import BUCKETS_VARIABLE
from dora.runtime.engine_transport import EngineTransport
from dora.runtime.parcel import pack
from dora.runtime.priority import ACTIVATION
from dora.runtime.snapshot import Snapshot, Snapshots, Version

RATE_BYTES_PER_S = 2e6
# Takes 16 s at that rate.
NUM_BYTES = 32 * 2**20
AGING_S = 0.05


def _overtake(rank: int, network: str) -> bool:
    """Sends an activation when a snapshot has long been waiting; returns which came first."""
    os.environ[BUCKETS_VARIABLE] = network
    transport = EngineTransport(timeout_s=30.0, aging_s=AGING_S)
    snapshots = Snapshots(transport, 30.0)
    mine = {"weight": pack(torch.zeros(NUM_BYTES // 4), None)} if rank == 0 else {}
    snapshot = Snapshot(Version(0, 0), 0, mine)
    snapshots.begin(snapshot, mine, 1 if mine else None, [] if mine else [0])
    signal = torch.ones(1) if mine else torch.zeros(1)
    if rank == 0:
        time.sleep(10 * AGING_S)  # until whatever has been posted is as urgent as can be
        transport.send(signal, 1, 1, "signal", priority=ACTIVATION).wait(30.0)
    else:
        transport.receive(signal, 0, 1, "signal").wait(30.0)
    is_first = signal.item() == 1.0 and not snapshot.is_done and not snapshot.is_failed
    dist.barrier()
    transport.interrupt("enough")
    snapshots.stop()
    transport.close()
    return is_first


def test_an_activation_overtakes_a_snapshot_that_has_waited_for_long(tmp_path: Path) -> None:
    network = tmp_path / "network"
    network.touch()
    _C.Buckets.create(str(network), 2, [RATE_BYTES_PER_S], {(0, 1): [0], (1, 0): [0]})
    assert run_ranks(2, _overtake, str(network)) == [True, True]
