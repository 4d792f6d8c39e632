"""Walks one rank's Actions: computes, starts sends, posts receives, waits only for what it needs.

    RECV  posts a receive        F  waits for its input, runs the stage
    SEND  starts a send          B  waits for its gradient, runs autograd

Every wait has a timeout and fails with rank, peer and action.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.autograd.graph import get_gradient_edge

from dora.runtime.batchnorm import BatchNormSync
from dora.runtime.boundary import BoundarySpec, tensors_of
from dora.runtime.frames import network_spans
from dora.runtime.handshake import Handshake
from dora.runtime.priority import ACTIVATION, URGENT, Priority
from dora.runtime.reduce import GradReducer
from dora.runtime.stage import Shapes, StageRunner, Step
from dora.runtime.tags import BACKWARD, FORWARD, LOSS_TAG, RESULT, first_tag, message_name
from dora.runtime.transport import Pending, Transport
from dora.spec import Action, Plan

__all__ = ["Executor", "Span", "Step"]

# Where the other end of a message is, in stages from here.
_NEIGHBOUR = {"SEND_F": 1, "RECV_B": 1, "SEND_B": -1, "RECV_F": -1}

# Sends under way per direction where all forwards come before all backwards: two keep the link
# busy, and the tensors of the others are free.
_MAX_SENDS = 2

Span = tuple[str, str, float, float]  # lane, label, start, end


class Executor:
    """Runs schedules for one rank of a plan.

    Args:
        plan: The placement that tells each message's peer.
        rank: This process.
        runner: This rank's stage.
        transport: Carries the messages.
        reducer: Sums gradients over replicas; None for inference.
        batchnorm: Keeps running statistics of replicas equal; None without replicas.
        timeout_s: Limit of every single wait.
    """

    def __init__(
        self,
        plan: Plan,
        rank: int,
        runner: StageRunner,
        transport: Transport,
        *,
        reducer: GradReducer,
        batchnorm: BatchNormSync | None,
        timeout_s: float,
    ) -> None:
        self.plan = plan
        self.rank = rank
        self.runner = runner
        self.transport = transport
        self.reducer = reducer
        self.batchnorm = batchnorm
        self.timeout_s = timeout_s
        self.spans: list[Span] = []
        self._ranks = [plan.ranks(stage.index) for stage in plan.stages]
        self._receives: dict[tuple[int, int], list[tuple[torch.Tensor, Pending]]] = {}
        self._sends: dict[tuple[int, int], list[Pending]] = {}
        self._handshake = Handshake(transport, rank, timeout_s)

    # ------------------------------------------------------------ walking

    def train(self, actions: Sequence[Action], step: Step) -> float:
        """Runs one training step; gradients end in the parameters of this rank.

        Returns:
            The loss of the whole batch, equal on all ranks.
        """
        self.reducer.begin()
        if self.batchnorm is not None:
            self.batchnorm.begin(len(step.inputs))
        losses = self._post_losses(step)
        self._walk(actions, step)
        loss = self._collect_losses(step, losses)
        self._timed("wait", "REDUCE_GRAD", lambda: self.reducer.finish(self.timeout_s))
        if self.batchnorm is not None:
            self.batchnorm.finish(self.timeout_s)
        self._finish_sends()
        return loss

    def infer(self, actions: Sequence[Action], step: Step, to_ranks: Sequence[int]) -> list[Any]:
        """Runs one inference call.

        Args:
            actions: Of this rank.
            step: The inputs.
            to_ranks: Ranks that get the outputs.

        Returns:
            The model's output per micro-batch; empty on ranks that do not get it.
        """
        self._walk(actions, step, to_ranks)
        others = [dst for dst in to_ranks if dst != self.rank]
        for m, output in step.results.items():
            tensors = tensors_of(output)
            if others:
                self._result_spec(m, step).check(tensors, "the result")
            for dst in others:
                self._send(tensors, dst, RESULT, m, "the result", URGENT)
        outputs = []
        if self.rank in to_ranks:
            self._receive_results(step)
            outputs = [self._result(m, step) for m in range(len(step.inputs))]
        self._finish_sends()
        return outputs

    def _walk(self, actions: Sequence[Action], step: Step, to_ranks: Sequence[int] = ()) -> None:
        self.spans.clear()
        self._begin(actions, step, to_ranks)
        last_backward = max((i for i, a in enumerate(actions) if a.kind == "B"), default=-1)
        run = {
            "F": self._forward,
            "B": self._backward,
            "SEND_F": self._send_forward,
            "SEND_B": self._send_backward,
            "RECV_F": self._receive_forward,
            "RECV_B": self._receive_backward,
        }
        for i, action in enumerate(actions):
            if i == last_backward:
                self.reducer.arm()
            if action.kind == "REDUCE_GRAD":
                self.reducer.flush()
            elif action.kind in run:  # OPT is the user's own optimizer
                run[action.kind](action, step)

    # ------------------------------------------------------------ compute

    def _forward(self, action: Action, step: Step) -> None:
        m = action.microbatch
        args, kwargs = step.inputs[m]
        received = []
        if action.stage > 0:
            received = self._wait(FORWARD, m, f"RECV_F {action}")
            self._finish_old_backward_sends(action, step)
            spec = self._shapes(m, step).received
            assert spec is not None
            for leaf, tensor in zip(spec.tensors, received, strict=True):
                tensor.requires_grad_(leaf.requires_grad)
        start = time.perf_counter()
        if self.batchnorm is not None and step.loss_fn is not None:
            self.batchnorm.before_forward()
        output = self.runner.forward(
            args, kwargs, received, self._shapes(m, step), step.key._replace(microbatch=m)
        )
        if self.batchnorm is not None and step.loss_fn is not None:
            self.batchnorm.after_forward(m)
        self._keep(m, received, output, step)
        self.spans.append(("compute", str(action), start, time.perf_counter()))

    def _keep(self, m: int, received: list[torch.Tensor], output: Any, step: Step) -> None:
        """Keeps what backward or the send needs, and no more."""
        if not self.runner.is_last:
            step.outputs[m] = tensors_of(output)
        elif step.loss_fn is None:
            step.results[m] = output
        else:
            loss = step.loss_fn(output, step.targets[m])
            if not isinstance(loss, torch.Tensor) or loss.dim() > 0:
                raise ValueError(f"loss_fn: given {type(loss).__name__}, allowed a scalar tensor")
            loss = loss * step.weights[m]
            step.roots[m] = [loss] if loss.requires_grad else []
            kept = loss.detach().double()
            step.loss = kept if step.loss is None else step.loss + kept
        if step.loss_fn is not None:
            step.received[m] = received

    def _backward(self, action: Action, step: Step) -> None:
        m = action.microbatch
        roots: list[Any] = list(step.roots.pop(m))
        if self.runner.is_last:
            grads: list[torch.Tensor | None] = [None] * len(roots)
        else:
            grads = list(self._wait(BACKWARD, m, f"RECV_B {action}"))
            if len(roots) > 1:
                used = grads.pop()
                assert used is not None
                roots = [root for root, flag in zip(roots, used.tolist(), strict=True) if flag]
                grads = [grad for grad, flag in zip(grads, used.tolist(), strict=True) if flag]
            self._finish_sends_of(FORWARD, m)  # the peer has it, or no gradient had come
        start = time.perf_counter()
        if roots:
            torch.autograd.backward(roots, grads)
        self.spans.append(("compute", str(action), start, time.perf_counter()))

    # ------------------------------------------------------------ messages

    def _send_forward(self, action: Action, step: Step) -> None:
        m = action.microbatch
        tensors = step.outputs.pop(m)
        spec = self._shapes(m, step).sent
        assert spec is not None
        spec.check(tensors, f"{action}")
        step.roots[m] = [get_gradient_edge(x) for x in tensors if x.requires_grad]
        dst = self._peer(action.stage + 1, m, step)
        self._limit_sends(FORWARD, step)
        priority = ACTIVATION._replace(deadline=step.deadlines.get(action, 0.0))
        self._send([x.detach() for x in tensors], dst, FORWARD, m, f"{action}", priority)

    def _send_backward(self, action: Action, step: Step) -> None:
        m = action.microbatch
        leaves = [leaf for leaf in step.received.pop(m) if leaf.requires_grad]
        grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]
        if len(leaves) > 1:  # some may be unused here: no gradient is not a zero gradient
            grads.append(torch.tensor([x.grad is not None for x in leaves], dtype=torch.uint8))
        self._limit_sends(BACKWARD, step)
        priority = ACTIVATION._replace(deadline=step.deadlines.get(action, 0.0))
        dst = self._peer(action.stage - 1, m, step)
        self._send(grads, dst, BACKWARD, m, f"{action}", priority)

    def _receive_forward(self, action: Action, step: Step) -> None:
        m = action.microbatch
        spec = self._shapes(m, step).received
        assert spec is not None
        tensors = [leaf.empty() for leaf in spec.tensors]
        self._receive(tensors, self._peer(action.stage - 1, m, step), FORWARD, m, f"{action}")

    def _receive_backward(self, action: Action, step: Step) -> None:
        m = action.microbatch
        spec = self._shapes(m, step).sent
        assert spec is not None
        tensors = [leaf.empty() for leaf in spec.tensors if leaf.requires_grad]
        if len(tensors) > 1:
            tensors.append(torch.empty(len(tensors), dtype=torch.uint8))
        self._receive(tensors, self._peer(action.stage + 1, m, step), BACKWARD, m, f"{action}")

    def _peer(self, stage: int, microbatch: int, step: Step) -> int:
        return self._ranks[stage][step.routes[microbatch][stage]]

    def _shapes(self, m: int, step: Step) -> Shapes:
        """Infers shapes once per size: micro-batches of one step differ in nothing else."""
        if m not in step.shapes:
            sizes = tuple(x.shape for x in tensors_of(step.inputs[m]))
            if sizes not in step.shapes:
                step.shapes[sizes] = self.runner.shapes(*step.inputs[m])
            step.shapes[m] = step.shapes[sizes]
        return step.shapes[m]

    def _send(
        self,
        tensors: list[torch.Tensor],
        dst: int,
        direction: int,
        m: int,
        action: str,
        priority: Priority,
    ) -> None:
        tag = first_tag(direction, m)
        self._sends.setdefault((direction, m), []).extend(
            self.transport.send(x.contiguous().cpu(), dst, tag + i, action, priority=priority)
            for i, x in enumerate(tensors)
        )

    def _receive(
        self, tensors: list[torch.Tensor], src: int, direction: int, m: int, action: str
    ) -> None:
        self._handshake.check(src)
        tag = first_tag(direction, m)
        self._receives[direction, m] = [
            (x, self.transport.receive(x, src, tag + i, action)) for i, x in enumerate(tensors)
        ]

    def _wait(self, direction: int, m: int, label: str) -> list[torch.Tensor]:
        pending = self._receives.pop((direction, m))
        self._timed("wait", label, lambda: self._finish(op for _, op in pending))
        device = self.runner.device
        return [x if device.type == "cpu" else x.to(device) for x, _ in pending]

    def _timed(self, lane: str, label: str, work: Callable[[], Any]) -> None:
        start = time.perf_counter()
        work()
        self.spans.append((lane, label, start, time.perf_counter()))

    def _finish(self, operations: Iterable[Pending]) -> None:
        for operation in operations:
            operation.wait(self.timeout_s)

    def _finish_sends_of(self, direction: int, m: int) -> None:
        self._finish(self._sends.pop((direction, m), ()))

    def _finish_sends(self) -> None:
        for direction, m in list(self._sends):
            self._finish_sends_of(direction, m)
        self._handshake.finish()

    def _limit_sends(self, direction: int, step: Step) -> None:
        """Waits for all but the latest sends, so that outputs and gradients do not pile up.

        Only where all forwards come before all backwards: what such a send waits for needs
        smaller micro-batches alone, so nothing deadlocks. Under 1F1B with a deep warm-up a peer
        may have to wait for this rank's next forward; there the window is the limit.
        """
        if step.loss_fn is None or self.plan.schedule_kind == "gpipe":
            started = [m for d, m in self._sends if d == direction]
            for m in started[:-_MAX_SENDS]:
                self._finish_sends_of(direction, m)

    def _finish_old_backward_sends(self, action: Action, step: Step) -> None:
        """Frees gradients that the previous stage must have received by now, under 1F1B.

        That stage runs forward m only after backward j for all j <= m - W, so the arrival of
        its forward m proves that it has its gradients of those j.
        """
        previous, m = action.stage - 1, action.microbatch
        newest = m - self.plan.warmup[previous] if self.plan.schedule_kind == "1f1b" else -1
        src = self._peer(previous, m, step)
        for direction, j in list(self._sends):
            if direction == BACKWARD and j <= newest and self._peer(previous, j, step) == src:
                self._finish_sends_of(direction, j)

    def all_spans(self) -> list[Span]:
        """Returns what this rank did in the last call, with its traffic if the transport tells."""
        start_s = min((start for _, _, start, _ in self.spans), default=0.0)
        return [*self.spans, *network_spans(self.transport.frames(), start_s, message_name)]

    # ------------------------------------------------------------ agreement and results

    def _begin(self, actions: Sequence[Action], step: Step, to_ranks: Sequence[int]) -> None:
        """Announces the step to every rank that gets data from this one."""
        dst: set[int] = set()
        src: set[int] = set()
        for stage, kind, m in actions:
            if kind in _NEIGHBOUR:
                peer = self._peer(stage + _NEIGHBOUR[kind], m, step)
                (dst if kind.startswith("SEND") else src).add(peer)
        if self.rank in to_ranks:
            src |= self._last_ranks(step)
        if self.rank in self._last_ranks(step):
            dst |= set(to_ranks)
        own = {self.rank}
        self._handshake.begin(step.key.step, step.header, dst=dst - own, src=src - own)

    def _last_ranks(self, step: Step) -> set[int]:
        """Returns the ranks that compute outputs or losses in this step."""
        last = len(self.plan.stages) - 1
        return {self._peer(last, m, step) for m in range(len(step.routes))}

    def _post_losses(self, step: Step) -> dict[int, tuple[torch.Tensor, Pending]]:
        """Posts a receive of (loss, call, digest) from every rank of the last stage."""
        losses = {}
        for src in sorted(self._last_ranks(step) - {self.rank}):
            loss = torch.empty(3, dtype=torch.float64)
            losses[src] = loss, self.transport.receive(loss, src, LOSS_TAG, "the loss")
        return losses

    def _collect_losses(self, step: Step, losses: dict[int, tuple[torch.Tensor, Pending]]) -> float:
        mine = 0.0 if step.loss is None else float(step.loss)
        if self.rank in self._last_ranks(step):
            message = torch.cat([torch.tensor([mine], dtype=torch.float64), self._handshake.stamp])
            self._sends[-1, 1] = [
                self.transport.send(message, dst, LOSS_TAG, "the loss", priority=URGENT)
                for dst in range(len(self.plan.devices))
                if dst != self.rank
            ]
        self._timed("wait", "loss", lambda: self._finish(op for _, op in losses.values()))
        by_rank = {self.rank: mine}
        for src, (message, _) in losses.items():
            self._handshake.compare(message[1:], src)
            by_rank[src] = float(message[0])
        return sum(by_rank[rank] for rank in sorted(by_rank))

    def _result_spec(self, m: int, step: Step) -> BoundarySpec:
        args, kwargs = step.inputs[m]
        spec = self.runner.shapes(args, kwargs, whole=True).result
        assert spec is not None
        return spec

    def _receive_results(self, step: Step) -> None:
        """Posts receives of all outputs that other ranks computed."""
        for m in range(len(step.inputs)):
            src = self._peer(len(self.plan.stages) - 1, m, step)
            if src != self.rank:
                tensors = [leaf.empty() for leaf in self._result_spec(m, step).tensors]
                self._receive(tensors, src, RESULT, m, "the result")

    def _result(self, m: int, step: Step) -> Any:
        if m in step.results:
            return step.results[m]
        return self._result_spec(m, step).fill(self._wait(RESULT, m, "the result"))
