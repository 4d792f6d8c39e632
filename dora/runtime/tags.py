"""Tags of the executor's messages: every message of a step has its own, so wire order is free."""

from __future__ import annotations

HEADER_TAG, LOSS_TAG = 0, 1

# RECV_F and SEND_F of one boundary share a direction, RECV_B and SEND_B another.
FORWARD, BACKWARD, RESULT = 0, 1, 2

_FIRST_TAG, _MAX_LEAVES = 2, 64
# Above those of any number of micro-batches.
_FIRST_REDUCE_TAG = 1 << 29
MOVE_TAG, FETCH_AHEAD_TAG, SNAPSHOT_TAG = (1 << 30, (1 << 30) + 1, (1 << 30) + 2)


def first_tag(direction: int, microbatch: int) -> int:
    """Returns the tag of the first tensor of a boundary; the others follow."""
    return _FIRST_TAG + (microbatch * 3 + direction) * _MAX_LEAVES


def reduce_tag(bucket: int) -> int:
    """Returns the tag of the codes of a bucket of gradients; their sum has the next."""
    return _FIRST_REDUCE_TAG + 2 * bucket


def message_name(tag: int) -> str:
    """Returns what travels under a tag, such as 'F3' for the activations of micro-batch 3."""
    if tag < _FIRST_TAG:
        return "reduce" if tag < 0 else "loss" if tag == LOSS_TAG else "header"
    if tag >= _FIRST_REDUCE_TAG:
        return "weights" if tag >= MOVE_TAG else "reduce"
    m, direction = divmod((tag - _FIRST_TAG) // _MAX_LEAVES, 3)
    return f"{('F', 'B', 'result')[direction]}{m}"
