"""Which senders share a medium, as a plan says: what the engine's arbiters are told."""

from __future__ import annotations

from collections.abc import Collection

from dora.runtime.rendezvous import Links
from dora.spec import Plan


def shared_media(plan: Plan, rank: int, members: Collection[int] | None = None) -> Links:
    """Returns the media that this rank shares with other senders, and who lends them.

    A medium that only one device sends on needs nobody to lend it. The lowest rank that sends on
    a shared one does: it knows of its own wishes without a message.

    Args:
        plan: Its links name the media.
        rank: This process.
        members: Ranks that are there; None for all.
    """
    position = {name: i for i, name in enumerate(plan.devices)}
    senders: dict[str, set[int]] = {}
    there = {*position.values()} if members is None else {*members}
    links = [link for link in plan.links if {position[link.src], position[link.dst]} <= there]
    for link in links:
        for medium in link.media:
            senders.setdefault(medium, set()).add(position[link.src])
    shared = sorted(medium for medium, ranks in senders.items() if len(ranks) > 1)
    number = {medium: i for i, medium in enumerate(shared)}
    media = {
        position[link.dst]: sorted({number[m] for m in link.media if m in number})
        for link in links
        if position[link.src] == rank
    }
    arbiters = {number[medium]: min(senders[medium]) for medium in shared}
    return Links(
        media={peer: crossed for peer, crossed in media.items() if crossed}, arbiters=arbiters
    )
