"""Measures what the planner needs to know: the blocks of a model and the links of a network.

compute.py   runs a chain of blocks on this device -> ModelProfile
passes.py    one micro-batch through the chain, forward and backward block by block
probes.py    what is watched meanwhile: time, operations, bytes
rest.py      what a device that has waited does at once
codecs.py    how fast this device encodes and decodes compressed tensors
link.py      times messages between the ranks of a process group -> rates, latencies, Cluster
wire.py      the messages that this takes
energy.py    joules between two points in time; meters.py  what hardware has to tell them
replay.py    the same profiles from files, and several devices' profiles as one
"""

from dora.profiler.codecs import measure_codecs
from dora.profiler.compute import profile_model
from dora.profiler.energy import EnergyMeter, find_meters
from dora.profiler.link import (
    FlowRate,
    LinkRate,
    contention,
    measure_concurrent,
    measure_links,
    parallelism,
    to_cluster,
)
from dora.profiler.passes import BlockChain, resize_batch
from dora.profiler.replay import load_profiles, merge_profiles
from dora.profiler.rest import Rest, measure_rest

__all__ = [
    "BlockChain",
    "EnergyMeter",
    "FlowRate",
    "LinkRate",
    "Rest",
    "contention",
    "find_meters",
    "load_profiles",
    "measure_codecs",
    "measure_concurrent",
    "measure_links",
    "measure_rest",
    "merge_profiles",
    "parallelism",
    "profile_model",
    "resize_batch",
    "to_cluster",
]
