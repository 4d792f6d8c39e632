"""What a group of ranks is to torch.distributed, and its messages; collectives build on it."""

# torch declares overloads that nobody calls on a group, and its own type of group names.
# mypy: disable-error-code="override, assignment"

from __future__ import annotations

import zlib
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from torch._C._distributed_c10d import ProcessGroup, Store

from dora.runtime.communicator import Communicator
from dora.runtime.pending import Pending
from dora.runtime.pieces import only
from dora.runtime.priority import ACTIVATION, GRADIENT, Priority, checked, chosen
from dora.runtime.work import DoraWork

NAME = "dora"
CLASS_SHIFT = 28
_MATCH_MASK = (1 << CLASS_SHIFT) - 1


class Group(ProcessGroup):
    """A group of ranks that share one Communicator with all groups of the process.

    Args:
        communicator: Connects the ranks.
        store: Of the group.
        ranks: The communicator's rank of every member.
        name: Equal on all members.
        timeout_s: Limit of every operation that has none of its own.
        is_owner: Whether `shutdown` closes the communicator.
    """

    supports_coalescing = False
    supports_splitting = False

    def __init__(
        self,
        communicator: Communicator,
        store: Store,
        ranks: Sequence[int],
        *,
        name: str,
        timeout_s: float,
        is_owner: bool,
    ) -> None:
        super().__init__(ranks.index(communicator.rank), len(ranks))  # type: ignore[call-arg]
        self.communicator = communicator
        self._store = store
        self.members = list(ranks)
        self._number = zlib.crc32(f"{name} {self.members}".encode())
        self._timeout_s = timeout_s
        self._is_owner = is_owner
        self._is_down = False
        self._name = name
        self._desc = ""

    # ------------------------------------------------------------ messages

    def send(self, tensors: list[torch.Tensor], dst: int, tag: int) -> DoraWork:
        """Starts a send to the group's rank `dst`."""
        tag, priority = _split(tag)
        pending = self.post_send(only(tensors), dst, tag, priority, "send")
        return DoraWork(pending, tensors)

    def recv(self, tensors: list[torch.Tensor], src: int, tag: int) -> DoraWork:
        """Posts a receive from the group's rank `src`."""
        pending = self.post_receive(only(tensors), src, _split(tag)[0], "receive")
        return DoraWork(pending, tensors, lambda _: src)

    def recv_anysource(self, tensors: list[torch.Tensor], tag: int) -> DoraWork:
        """Posts a receive from anybody in the group."""
        pending = self.usable().receive(
            only(tensors),
            None,
            group=self._number,
            tag=_split(tag)[0],
            timeout_s=self._timeout_s,
        )
        return DoraWork(pending, tensors, self.members.index)

    def post_send(
        self,
        tensor: torch.Tensor,
        dst: int,
        tag: int,
        priority: Priority,
        action: str,
        timeout_s: float | None = None,
    ) -> Pending:
        """Starts a send to a rank of the group."""
        return self.usable().send(
            tensor,
            self.members[dst],
            group=self._number,
            tag=tag,
            priority=priority,
            timeout_s=timeout_s or self._timeout_s,
            action=action,
        )

    def post_receive(
        self,
        tensor: torch.Tensor,
        src: int,
        tag: int,
        action: str,
        timeout_s: float | None = None,
    ) -> Pending:
        """Posts a receive from a rank of the group."""
        return self.usable().receive(
            tensor,
            self.members[src],
            group=self._number,
            tag=tag,
            timeout_s=timeout_s or self._timeout_s,
            action=action,
        )

    # ------------------------------------------------------------ life

    def shutdown(self) -> None:
        """Waits until sends have left; the default group then closes all connections."""
        self._is_down = True
        if self._is_owner:
            self.communicator.close()

    def abort(self) -> None:
        """Fails all that is under way; of the default group, also at the peers."""
        self._is_down = True
        if self._is_owner:
            self.communicator.close(0.0)

    def set_timeout(self, timeout: timedelta) -> None:
        """Sets the limit of operations that have none of their own."""
        self._timeout_s = timeout.total_seconds()

    setTimeout = _set_default_timeout = set_timeout  # noqa: N815

    # ------------------------------------------------------------ what torch asks

    def getBackendName(self) -> str:  # noqa: N802
        """Returns the name that `init_process_group` takes."""
        return NAME

    name = getBackendName

    def get_group_store(self) -> Store:
        """Returns the store of the group."""
        return self._store

    @property
    def group_name(self) -> str:
        """The name by which compiled code and DeviceMesh find the group."""
        return self._name

    @property
    def group_desc(self) -> str:
        """What the group is for."""
        return self._desc

    def getGroupName(self) -> str:  # noqa: N802
        """See `group_name`."""
        return self._name

    def _set_group_name(self, name: str) -> None:
        self._name = name

    def _set_group_desc(self, desc: str) -> None:
        self._desc = desc

    def _get_backend(self, device: torch.device) -> Group:
        return self

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device("cpu")] + [torch.device("cuda")] * torch.cuda.is_available()

    # ------------------------------------------------------------ settings

    def usable(self) -> Communicator:
        """Returns the communicator, unless the group was shut down."""
        if self._is_down:
            raise RuntimeError(f"group {self._name}: it was shut down, allowed: a new group")
        return self.communicator

    def limit(self, opts: Any) -> float:
        """Returns the timeout of a call in seconds, or that of the group."""
        timeout: timedelta | None = getattr(opts, "timeout", None)
        given_s = 0.0 if timeout is None else timeout.total_seconds()
        return given_s if given_s > 0 else self._timeout_s

    def how(self, opts: Any) -> dict[str, Any]:
        """Returns what collectives of this group pass to the communicator."""
        return {
            "group": self._number,
            "priority": kind_or_chosen(GRADIENT),
            "timeout_s": self.limit(opts),
        }


def kind_or_chosen(kind: Priority) -> Priority:
    """Returns the priority of the innermost `priority` block, else that of the kind."""
    return chosen() or kind


def _split(tag: int) -> tuple[int, Priority]:
    """Returns what is matched of a tag, and the priority of its message."""
    if tag < 0:
        raise ValueError(f"tag: given {tag}, allowed: 0 or more")
    traffic_class = tag >> CLASS_SHIFT
    priority = Priority(traffic_class) if traffic_class else kind_or_chosen(ACTIVATION)
    return tag & _MATCH_MASK, checked(priority)
