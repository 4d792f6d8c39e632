"""The communication engine, compiled from csrc/. Memory is given as address and byte count.

Addresses come from `tensor.data_ptr()`; the caller keeps the tensor alive, contiguous and, for a
send, unchanged until the operation is done. Every blocking call releases the GIL.
"""

from collections.abc import Mapping, Sequence
from typing import Any

class Operation:
    """A send, receive or collective under way."""

    @property
    def id(self) -> int: ...
    @property
    def source(self) -> int:
        """The sender, once a receive from any source is done; -1 before."""
    @property
    def outcome(self) -> str:
        """pending, done, timed_out, cancelled, peer_lost, protocol or closed."""
    @property
    def error(self) -> str:
        """Why it failed: rank, peer and action; empty otherwise."""
    def is_done(self) -> bool:
        """Finished, well or not."""
    def wait(self, timeout_s: float) -> bool:
        """Blocks until finished or `timeout_s` has passed; returns is_done()."""
    def notify(self, queue: CompletionQueue) -> None:
        """Puts its id into `queue` when it is finished."""

class CompletionQueue:
    """Ids of finished operations, for a thread that acts on them."""

    def __init__(self) -> None: ...
    def take(self, timeout_s: float) -> list[int]:
        """Blocks until something has finished or `close` was called."""
    def close(self) -> None: ...
    @property
    def is_closed(self) -> bool: ...

class Engine:
    """One rank's connections: sends and receives bytes by priority.

    Args:
        rank: This process.
        key: Shared secret of the job, 16 bytes or more.
        job: Any number, equal on all ranks.
        epoch: Of the membership; a peer in another epoch is refused.
        protection: header, checksum, mac or encrypt; equal on all ranks.
        host: Address to listen on.
        port: To listen on; 0 takes a free one.
        eager_bytes: Larger messages are granted one by one; at most 16384.
        eager_credit_bytes: Unexpected data that this rank stores per peer.
        heartbeat_s: A silent connection is asked for a sign of life this often.
        dead_s: A peer that is silent for so long is lost.
        connect_timeout_s: Limit of connecting and authenticating.
        aging_s: The first message of a class of which nothing leaves so long moves up one, up to
            `activation`.
        pacing: Limit the rate to just below the link's, so that no queue builds up in it.
        dscp: Mark sockets with a class for access points (WMM).
        log_frames: How many of the latest frames `log()` returns.
        buckets: File of an emulated network, see `Buckets`, whose devices are the ranks; then what
            is sent takes as long as its media need. Empty: none.
    """

    def __init__(
        self,
        rank: int,
        key: bytes,
        *,
        job: int = 0,
        epoch: int = 0,
        protection: str = "checksum",
        host: str = "0.0.0.0",
        port: int = 0,
        eager_bytes: int = 16384,
        eager_credit_bytes: int = 4194304,
        heartbeat_s: float = 1.0,
        dead_s: float = 10.0,
        connect_timeout_s: float = 30.0,
        aging_s: float = 2.0,
        pacing: bool = True,
        dscp: bool = True,
        log_frames: int = 0,
        buckets: str = "",
    ) -> None: ...
    @property
    def port(self) -> int: ...
    @property
    def epoch(self) -> int: ...
    def connect(
        self,
        peers: Mapping[int, tuple[str, int]],
        *,
        media: Mapping[int, Sequence[int]] = ...,
        arbiters: Mapping[int, int] = ...,
        rates: Mapping[int, float] = ...,
    ) -> None:
        """Starts connecting to all peers; the lower rank calls the higher one.

        Args:
            peers: Rank -> (numeric address, port).
            media: Peer -> shared media that bulk to it crosses, by number.
            arbiters: Medium -> the rank that lends it.
            rates: Peer -> known bytes per second of the path; measured where missing.
        """
    def wait_connected(self, timeout_s: float) -> list[int]:
        """Blocks until every peer has connected or failed to; returns those that never did."""
    def send(
        self,
        address: int,
        num_bytes: int,
        dst: int,
        *,
        group: int = 0,
        tag: int = 0,
        traffic_class: int = 2,
        deadline: float = 0.0,
        unit_bytes: int = 1,
        timeout_s: float = 60.0,
    ) -> Operation:
        """Starts a send; done when the memory may change again.

        What leaves at once ends at a multiple of `unit_bytes`, at most 16 KiB.
        """
    def receive(
        self,
        address: int,
        num_bytes: int,
        src: int,
        *,
        group: int = 0,
        tag: int = 0,
        timeout_s: float = 60.0,
    ) -> Operation:
        """Posts a receive; `src` -1 takes the first message with that tag from anybody."""
    def cancel(self, operation: Operation) -> None:
        """Fails an operation here and at the peer."""
    def reprioritise(self, operation: Operation, traffic_class: int, deadline: float = 0.0) -> None:
        """Changes the priority of a send that has not left yet."""
    def all_reduce(
        self,
        address: int,
        count: int,
        dtype: str,
        op: str,
        ranks: Sequence[int],
        *,
        shares: Sequence[float] = (),
        group: int = 0,
        traffic_class: int = 3,
        deadline: float = 0.0,
        timeout_s: float = 60.0,
    ) -> Operation:
        """Reduces in place.

        Args:
            address: Of `count` elements.
            count: Elements, not bytes.
            dtype: float32 float64 float16 bfloat16 int8 uint8 int16 int32 or int64.
            op: sum, product, min or max.
            ranks: Who takes part, in the same order on all of them.
            shares: Weights of the ranks for an average; () for none.
            group: Calls of one group are matched in the order they are made.
            traffic_class: Of its messages.
            deadline: Of its messages.
            timeout_s: Limit of the whole.
        """
    def reduce_scatter(
        self,
        input_address: int,
        output_address: int,
        count: int,
        dtype: str,
        op: str,
        ranks: Sequence[int],
        *,
        group: int = 0,
        traffic_class: int = 3,
        deadline: float = 0.0,
        timeout_s: float = 60.0,
    ) -> Operation: ...
    def all_gather(
        self,
        input_address: int,
        output_address: int,
        num_bytes: int,
        ranks: Sequence[int],
        *,
        group: int = 0,
        traffic_class: int = 3,
        deadline: float = 0.0,
        timeout_s: float = 60.0,
    ) -> Operation: ...
    def broadcast(
        self,
        address: int,
        num_bytes: int,
        root: int,
        ranks: Sequence[int],
        *,
        group: int = 0,
        traffic_class: int = 3,
        deadline: float = 0.0,
        timeout_s: float = 60.0,
    ) -> Operation: ...
    def barrier(
        self, ranks: Sequence[int], *, group: int = 0, timeout_s: float = 60.0
    ) -> Operation: ...
    def events(self) -> list[tuple[str, int, str]]:
        """Takes what happened since the last call: (kind, rank, text).

        Kinds: connected, peer_lost, refused (a connection that failed to authenticate),
        arbiter_lost.
        """
    def reconfigure(self, epoch: int) -> None:
        """Fails all operations, drops all connections and starts anew; then call `connect`."""
    def stats(self) -> dict[str, object]:
        """Counters of this rank, and per peer: rates, round trips, queue times, preemptions."""
    def log(self) -> list[tuple[float, float, bool, int, str, int, int, int, int, int, int]]:
        """The latest frames, with times of `time.perf_counter()`.

        Returns:
            (start_s, end_s, was it sent, peer, type, class, group, tag, seq, offset, length).
        """
    def close(self, linger_s: float = 1.0) -> None:
        """Lets sends leave, and be read, for up to `linger_s` each; fails the rest."""

class Buckets:
    """Media of an emulated network, in a file that its processes map; see csrc/bucket.h.

    Args:
        path: A file that `create` has made.
    """

    @staticmethod
    def create(
        path: str,
        num_devices: int,
        rates: Sequence[float],
        paths: Mapping[tuple[int, int], Sequence[int]],
    ) -> None:
        """Lays out the file.

        Args:
            path: A new or empty file.
            num_devices: Ranks are devices.
            rates: Bytes per second of each medium; 0 is down.
            paths: (from, to) -> the media crossed, as often as crossed; other pairs have no limit.
        """
    def __init__(self, path: str) -> None: ...
    def set_rate(self, medium: int, bytes_per_s: float) -> None:
        """Changes a rate, from now on; in one process only."""
    def rate(self, medium: int) -> float: ...
    def set_connected(self, device: int, is_connected: bool) -> None:
        """Plugs the cable of a device in or out."""
    def has_joined(self, device: int) -> bool:
        """Whether it has ever been connected with another device."""
    def carried_bytes(self, medium: int) -> int:
        """Payload that has passed it, once per crossing."""
    def sent_bytes(self, device: int) -> int: ...
    def received_bytes(self, device: int) -> int: ...

class SendQueue:
    """The order in which messages to one peer leave; see csrc/send_queue.h."""

    def __init__(self, aging_s: float, credit_bytes: int) -> None: ...
    def post(
        self,
        id: int,
        num_bytes: int,
        traffic_class: int,
        deadline: float,
        now_s: float,
        is_ready: bool = True,
        unit_bytes: int = 1,
    ) -> None: ...
    def set_ready(self, id: int) -> bool: ...
    def reprioritise(self, id: int, traffic_class: int, deadline: float) -> bool: ...
    def cancel(self, id: int) -> bool: ...
    def next(self, now_s: float, chunk_bytes: int) -> tuple[int, int, int, bool] | None:
        """(id, offset, num_bytes, is_last) of the next chunk."""
    def set_credit(self, credit_bytes: int) -> None: ...
    def acknowledge(self, num_bytes: int) -> None: ...
    @property
    def outstanding(self) -> int: ...
    @property
    def queued_bytes(self) -> int: ...
    @property
    def preemptions(self) -> int: ...
    def __len__(self) -> int: ...

class Arbiter:
    """Lends a shared medium to one sender at a time; see csrc/arbiter.h.

    Methods return orders: ("allow" | "revoke", rank).
    """

    def __init__(self, aging_s: float) -> None: ...
    def want(
        self, rank: int, traffic_class: int, deadline: float, now_s: float
    ) -> list[tuple[str, int]]: ...
    def give_back(self, rank: int, now_s: float) -> list[tuple[str, int]]: ...
    def tick(self, now_s: float) -> list[tuple[str, int]]: ...
    @property
    def holder(self) -> int | None: ...

class RateEstimator:
    """Rate, round trip, chunk size and pace of a link; see csrc/rate.h."""

    def __init__(self) -> None: ...
    def on_sent(self, sent_bytes: int, now_s: float) -> None: ...
    def on_idle(self) -> None: ...
    def on_ack(self, acked_bytes: int, now_s: float) -> None: ...
    def on_queueing(self, queue_s: float, now_s: float) -> None: ...
    @property
    def rate_bytes_per_s(self) -> float | None: ...
    @property
    def min_rtt_s(self) -> float | None: ...
    def chunk_bytes(self) -> int: ...
    def pace_bytes_per_s(self, now_s: float) -> float: ...

class Handshake:
    """One side of the authentication, without I/O; see csrc/handshake.h.

    Failures raise HandshakeError, whose text names what differs and what to do.
    """

    @staticmethod
    def initiate(
        key: bytes,
        *,
        job: int = 0,
        epoch: int = 0,
        rank: int,
        peer_rank: int,
        lane: int = 0,
        protection: str = "checksum",
    ) -> Handshake: ...
    @staticmethod
    def respond(
        key: bytes, *, job: int = 0, epoch: int = 0, rank: int, protection: str = "checksum"
    ) -> Handshake: ...
    def output(self) -> bytes: ...
    @property
    def needed(self) -> int: ...
    def input(self, data: bytes) -> None: ...
    @property
    def is_done(self) -> bool: ...
    @property
    def peer_clock_s(self) -> float: ...
    @property
    def peer_rank(self) -> int: ...

class HandshakeError(RuntimeError):
    """`reason`, the last word of `args`: version, job, epoch, protection, member or key."""

PROBE_RANK: int
HEADER_BYTES: int

def crc32c(data: bytes, crc: int = 0) -> int: ...
def encode_fields(fields: Mapping[str, int]) -> bytes:
    """The 48 field bytes of a header, for tests.

    Args:
        fields: type, traffic_class, flags, group, tag, seq, offset, total, length, crc.
    """

def decode_fields(data: bytes) -> dict[str, int]:
    """Raises ValueError for what breaks the protocol."""

def reduce_into(into: int, other: int, count: int, dtype: str, op: str) -> None:
    """Element-wise reduction of raw memory at two addresses; for tests."""

def share_media(
    media: Sequence[tuple[float, Sequence[float]]],
    paths: Sequence[Sequence[int]],
    order: Sequence[float],
    discipline: str,
) -> list[float]:
    """Returns the rate of each flow.

    Args:
        media: (bytes/s, total efficiency with 1, 2, ... flows).
        paths: Media that each flow crosses, with multiplicity.
        order: Weights of the flows for 'fair', their priorities for 'priority'.
        discipline: 'fair' is max-min fair; 'priority' serves larger priorities first.
    """

class Network:
    """Devices and the media between them, by index."""

    def __init__(self, num_devices: int) -> None: ...
    def add_medium(self, rate_bytes_per_s: float, efficiency: Sequence[float]) -> int: ...
    def connect(self, src: int, dst: int, media: Sequence[int], latency_s: float) -> None: ...
    def set_rest(self, device: int, saved_s: float, sprint: float) -> None:
        """Says how far a device that has waited gets ahead, at `sprint` times its speed.

        Raises:
            ValueError: Less than nothing is saved, or the device would be slower.
        """

class Program:
    """What every rank does in order, and the transfers between them.

    A rank walks its list; only `compute` takes time, or waits for the transfer `after`. A transfer
    moves once it is sent and received; an input, from `not_before_s` on.
    """

    def __init__(
        self, network: Network, discipline: str = "priority", start_s: float = 0.0
    ) -> None: ...
    def transfer(
        self,
        src: int,
        dst: int,
        num_bytes: float,
        priority: float = 0.0,
        pace_bytes_per_s: float = 0.0,
        not_before_s: float = 0.0,
        is_input: bool = False,
    ) -> int:
        """Adds a transfer; ValueError if no link joins the two; a pace of 0 is no limit."""
    def compute(
        self, rank: int, duration_s: float, after: int = -1, not_before_s: float = 0.0
    ) -> int:
        """Appends a compute and returns its position in the list of the rank."""
    def send(self, rank: int, transfer: int) -> None: ...
    def receive(self, rank: int, transfer: int) -> None: ...
    def all_reduce(self, ranks: Sequence[int], num_bytes: float) -> None:
        """Appends a ring all-reduce to the lists of those ranks."""
    def change_rate(self, at_s: float, medium: int, factor: float) -> None:
        """From then on a medium has `factor` times its rate; call in ascending order of time."""
    def change_speed(self, at_s: float, rank: int, factor: float) -> None: ...
    @property
    def num_transfers(self) -> int: ...
    def tails(self) -> list[float]:
        """Per transfer, the longest path from its arrival to the end, without contention."""
    def priorities(self) -> list[float]:
        """The tails, with all rounds of reductions behind everything else."""
    def prioritise(self, priorities: Sequence[float]) -> None: ...
    def play(self) -> Played: ...

class Played:
    """What happened: seconds on the program's clock, lists by rank, transfer or medium."""

    @property
    def end_s(self) -> float:
        """Of the last compute or arrival; infinite if a rank never ends."""
    @property
    def stuck(self) -> int:
        """A rank that never ends: one that computes before one that waits; -1 if all end."""
    @property
    def busy_s(self) -> list[float]: ...
    @property
    def sent_bytes(self) -> list[float]: ...
    @property
    def received_bytes(self) -> list[float]: ...
    @property
    def medium_busy_s(self) -> list[float]: ...
    def ops(self, rank: int) -> list[tuple[float, float]]:
        """(start, end) of each entry of a rank's list; zeros for sends and receives."""
    def transfers(self) -> list[tuple[float, float]]:
        """(when only media held it back, arrival) of each transfer."""

class Step:
    """One step of a plan as numbers, to be priced.

    `devices`, `forward_s` and `backward_s` are [stage][replica], bytes are [boundary], `routes` is
    [micro-batch][stage], `reductions` are (devices, bytes) of ring all-reduces.
    """

    def __init__(
        self,
        devices: Sequence[Sequence[int]],
        forward_s: Sequence[Sequence[float]],
        backward_s: Sequence[Sequence[float]],
        down_bytes: Sequence[float],
        up_bytes: Sequence[float],
        routes: Sequence[Sequence[int]],
        warmup: Sequence[int],
        kind: str,
        reductions: Sequence[tuple[Sequence[int], float]],
        source: int,
        input_bytes: float,
        prefetch: int,
    ) -> None: ...
    def in_flight(self) -> list[list[int]]:
        """Most micro-batches that each replica holds between forward and backward."""
    def price(self, network: Network, discipline: str = "priority") -> Price:
        """Plays the step with each transfer as urgent as its tail is long."""

class Price:
    """What a step takes; lists by device."""

    @property
    def makespan_s(self) -> float: ...
    @property
    def interval_s(self) -> float:
        """Between steps, if only the busiest device or medium limited them."""
    @property
    def busy_s(self) -> list[float]: ...
    @property
    def sent_bytes(self) -> list[float]: ...
    @property
    def received_bytes(self) -> list[float]: ...

def share_microbatches(times_s: Sequence[float], num_microbatches: int) -> list[int]:
    """Returns how many micro-batches each replica gets so that the last ends earliest."""

def enumerate_chains(
    problem: Mapping[str, Any],
    by_energy: bool,
    cutoff_s: float,
    cutoff_j: float,
    width: int,
    per_state: int,
) -> tuple[list[tuple[float, float, list[int], list[int]]], float]:
    """Returns pipelines over groups of devices, best lower bound first; see csrc/chains.h.

    Args:
        problem: The fields of ChainProblem, arrays as numpy arrays.
        by_energy: Ranks by the bound of the energy, else of the time.
        cutoff_s: Bounds have to be below this.
        cutoff_j: The same for energy.
        width: Pipelines kept per block.
        per_state: Of those, at most so many with the same devices and first group.

    Returns:
        (seconds, joules, groups, ends of their blocks) of each, and the least bound of what was cut
        off for `width` or `per_state`, infinite if nothing was.
    """

def instruction_sets() -> list[str]:
    """What the compression kernels can use here, best first."""

def quantize_pack(
    *,
    values: int,
    dtype: str,
    count: int,
    wire: int,
    codes: str,
    group: int,
    is_stochastic: bool,
    seed: int,
    first_index: int,
    error: int,
    factors: int,
    num_channels: int,
    instruction_set: str,
) -> bool:
    """Encodes `count` values into the bytes at `wire`; see csrc/quantize.h.

    Addresses of 0 stand for nothing. Returns False if a value is infinite or not a number.
    """

def unpack_dequantize(
    *,
    wire: int,
    count: int,
    out: int,
    dtype: str,
    codes: str,
    group: int,
    first_index: int,
    add: int,
    add_dtype: str,
    factors: int,
    num_channels: int,
    instruction_set: str,
) -> None:
    """Decodes `count` values."""

def reduce_wires(
    *,
    wires: Sequence[int],
    weights: Sequence[float],
    count: int,
    wire: int,
    codes: str,
    group: int,
    is_stochastic: bool,
    seed: int,
    instruction_set: str,
) -> bool:
    """Encodes the weighted sum of what `wires` hold; returns as `quantize_pack`."""

def channel_factors(
    *,
    values: int,
    dtype: str,
    num_rows: int,
    num_channels: int,
    factors: int,
    instruction_set: str,
) -> None:
    """Writes the largest magnitude of each column as bfloat16; 1 for columns of zeros."""
