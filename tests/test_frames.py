"""The frame log as spans: merged while uninterrupted, split where something overtook."""

from __future__ import annotations

from dora.runtime.frames import Frame, network_spans
from dora.runtime.tags import BACKWARD, FORWARD, HEADER_TAG, LOSS_TAG, first_tag, message_name


def frame(start_s, end_s, tag, *, peer=1, is_sent=True, kind="data", seq=0):
    return Frame(start_s, end_s, is_sent, peer, kind, 2, 0, tag, seq, 0, 100)


def test_chunks_of_one_message_are_one_span():
    log = [frame(0, 1, 7), frame(1, 2, 7), frame(2, 3, 7)]
    assert network_spans(log, 0, str) == [("network", "7 to 1", 0, 3)]


def test_preempted_message_shows_what_overtook_it():
    log = [frame(0, 1, 7), frame(1, 2, 8), frame(2, 3, 7)]
    assert [span[1:] for span in network_spans(log, 0, str)] == [
        ("7 to 1", 0, 1),
        ("8 to 1", 1, 2),
        ("7 to 1", 2, 3),
    ]


def test_peers_and_directions_do_not_interrupt_each_other():
    log = [frame(0, 1, 7), frame(0, 2, 8, peer=2), frame(0, 2, 9, is_sent=False), frame(1, 3, 7)]
    labels = [label for _, label, _, _ in network_spans(log, 0, str)]
    assert labels == ["7 to 1", "8 to 2", "9 from 1"]


def test_control_frames_and_earlier_calls_are_left_out():
    log = [frame(0, 1, 7), frame(5, 6, 7, kind="ack"), frame(5, 6, 7, seq=1)]
    assert network_spans(log, 4, str) == [("network", "7 to 1", 5, 6)]


def test_message_names():
    names = [message_name(first_tag(way, 3) + 1) for way in (FORWARD, BACKWARD)]
    assert names == ["F3", "B3"]
    assert [message_name(tag) for tag in (HEADER_TAG, LOSS_TAG, -5)] == ["header", "loss", "reduce"]
