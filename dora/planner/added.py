"""What a replica's F and B take beside its blocks: codecs, and the runtime itself.

What a device saves by a rest is not known before a step is played; `rests_of` is for the player.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from dora.planner.codecs import Way, codec_s
from dora.planner.cost import StageCosts
from dora.spec import Overhead

if TYPE_CHECKING:
    from dora.planner.predict import Layout, Setting

Overheads = Mapping[str, Overhead]
_NONE = Overhead(device="any")


def rests_of(names: Sequence[str], overheads: Overheads) -> tuple[tuple[float, float], ...]:
    """Returns (seconds of work saved, sprint) of each device, for the simulator; () for none."""
    found = tuple(overheads.get(name, _NONE) for name in names)
    has_any = any(overhead.saved_s > 0 for overhead in found)
    return tuple((overhead.saved_s, overhead.sprint) for overhead in found if has_any)


def added_s(
    layout: Layout, known: Setting, costs: StageCosts, stage: int, replica: int
) -> tuple[float, float]:
    """Returns what F and B of one micro-batch take on a replica beside its blocks.

    An inner stage receives and sends a message with every F and every B, the first and the last
    one do one of the two.
    """
    forward_s, backward_s = coding_s(layout, known, costs, stage, replica)
    name = known.devices[layout.groups[stage].devices[replica]].name
    overhead = known.overheads.get(name, _NONE)
    num_messages = (stage > 0) + (stage + 1 < len(layout.groups))
    more_s = overhead.action_s + overhead.message_s * num_messages
    return forward_s + more_s, backward_s + more_s * known.training


def coding_s(
    layout: Layout, known: Setting, costs: StageCosts, stage: int, replica: int
) -> tuple[float, float]:
    """Returns what codecs add to F and to B of one micro-batch on a replica.

    At its boundaries a stage decodes activations and encodes gradients above, and the other way
    round below. A sum of gradients is encoded once and decoded twice, as a part and as the whole;
    that comes after the last B, and is spread over all of them.
    """
    device = known.devices[layout.groups[stage].devices[replica]]
    forward_s = backward_s = 0.0
    ends: list[tuple[int, Way, Way]] = [
        (stage - 1, "decode", "encode"),
        (stage, "encode", "decode"),
    ]
    for boundary, down, up in ends:
        if 0 <= boundary < len(layout.codecs):
            codec = layout.codecs[boundary]
            size = float(costs.boundary_bytes[layout.groups[boundary + 1].first])
            forward_s += codec_s(device, codec.forward, size, known.dtype, down, known.rates)
            if known.training:
                backward_s += codec_s(device, codec.backward, size, known.dtype, up, known.rates)
    group = layout.groups[stage]
    name = layout.gradient_codecs[stage] if layout.gradient_codecs else "none"
    if name != "none" and known.training and len(group.devices) > 1:
        size = float(costs.gradient_bytes[group.first, group.end])
        encode_s = codec_s(device, name, size, known.dtype, "encode", known.rates)
        decode_s = codec_s(device, name, size, known.dtype, "decode", known.rates)
        backward_s += (encode_s + 2 * decode_s) / max(layout.counts[stage][replica], 1)
    return forward_s, backward_s
