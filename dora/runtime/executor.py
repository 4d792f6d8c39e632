"""Walks one rank's Actions: computes, starts sends, posts receives, waits only for what it needs.

    RECV  posts a receive        F  waits for its input, runs the stage
    SEND  starts a send          B  waits for its gradient, runs autograd

Every wait has a timeout and fails with rank, peer and action.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.graph import get_gradient_edge

from dora.runtime.batchnorm import BatchNormSync
from dora.runtime.boundary import BoundarySpec, LeafSpec, tensors_of
from dora.runtime.compress import Arrival, Coder, Crossing, Encoder
from dora.runtime.frames import network_spans
from dora.runtime.mailbox import Mailbox, Span
from dora.runtime.priority import ACTIVATION, URGENT
from dora.runtime.reduce import GradReducer
from dora.runtime.stage import Shapes, StageRunner, Step
from dora.runtime.tags import BACKWARD, FORWARD, LOSS_TAG, RESULT, message_name
from dora.runtime.transport import Pending, Transport
from dora.spec import Action, Plan

__all__ = ["Executor", "Span", "Step"]

# Where the other end of a message is, in stages from here.
_NEIGHBOUR = {"SEND_F": 1, "RECV_B": 1, "SEND_B": -1, "RECV_F": -1}

# Sends under way per direction where all forwards come before all backwards: two keep the link
# busy, and the tensors of the others are free.
_MAX_SENDS = 2


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

    Attributes:
        coder: Encodes and decodes what crosses the boundaries.
        members: Ranks that are told the loss.
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
        self.coder = Coder(plan.codecs, rank)
        self.members: Sequence[int] = range(len(plan.devices))
        self._ranks = [plan.ranks(stage.index) for stage in plan.stages]
        self._mail = Mailbox(transport, rank, timeout_s)

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
        self._mail.timed("REDUCE_GRAD", lambda: self.reducer.finish(self.timeout_s))
        if self.batchnorm is not None:
            self.batchnorm.finish(self.timeout_s)
        self._mail.finish_sends()
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
                plain = [Encoder("the result", None)] * len(tensors)
                self._mail.send(
                    tensors, plain, dst, RESULT, m, action="the result", priority=URGENT
                )
        outputs = []
        if self.rank in to_ranks:
            self._receive_results(step)
            outputs = [self._result(m, step) for m in range(len(step.inputs))]
        self._mail.finish_sends()
        return outputs

    def _walk(self, actions: Sequence[Action], step: Step, to_ranks: Sequence[int] = ()) -> None:
        self._mail.spans.clear()
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
            received = self._mail.wait(FORWARD, m, f"RECV_F {action}")
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
        self._mail.spans.append(("compute", str(action), start, time.perf_counter()))

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
            grads = list(self._mail.wait(BACKWARD, m, f"RECV_B {action}"))
            if len(roots) > 1:
                used = grads.pop()
                assert used is not None
                roots = [root for root, flag in zip(roots, used.tolist(), strict=True) if flag]
                grads = [grad for grad, flag in zip(grads, used.tolist(), strict=True) if flag]
            self._mail.finish_sends_of(FORWARD, m)  # the peer has it, or no gradient had come
        start = time.perf_counter()
        if roots:
            torch.autograd.backward(roots, grads)
        self._mail.spans.append(("compute", str(action), start, time.perf_counter()))

    # ------------------------------------------------------------ messages

    def _send_forward(self, action: Action, step: Step) -> None:
        m = action.microbatch
        tensors = step.outputs.pop(m)
        spec = self._shapes(m, step).sent
        assert spec is not None
        spec.check(tensors, f"{action}")
        step.roots[m] = [get_gradient_edge(x) for x in tensors if x.requires_grad]
        self._limit_sends(FORWARD, step)
        at = Crossing(action.stage, FORWARD)
        self._send([x.detach() for x in tensors], spec.tensors, at, action, step)

    def _send_backward(self, action: Action, step: Step) -> None:
        m = action.microbatch
        spec = self._shapes(m, step).received
        assert spec is not None
        leaves = [leaf for leaf in step.received.pop(m) if leaf.requires_grad]
        grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]
        if len(leaves) > 1:  # some may be unused here: no gradient is not a zero gradient
            grads.append(torch.tensor([x.grad is not None for x in leaves], dtype=torch.uint8))
        self._limit_sends(BACKWARD, step)
        self._send(grads, spec.returned, Crossing(action.stage - 1, BACKWARD), action, step)

    def _receive_forward(self, action: Action, step: Step) -> None:
        spec = self._shapes(action.microbatch, step).received
        assert spec is not None
        at = Crossing(action.stage - 1, FORWARD)
        self._receive(spec.tensors, at, action, step)

    def _receive_backward(self, action: Action, step: Step) -> None:
        spec = self._shapes(action.microbatch, step).sent
        assert spec is not None
        self._receive(spec.returned, Crossing(action.stage, BACKWARD), action, step)

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
        tensors: Sequence[torch.Tensor],
        leaves: Sequence[LeafSpec],
        at: Crossing,
        action: Action,
        step: Step,
    ) -> None:
        m = action.microbatch
        dst = self._peer(action.stage + _NEIGHBOUR[action.kind], m, step)
        priority = ACTIVATION._replace(deadline=step.deadlines.get(action, 0.0))
        key = step.key._replace(microbatch=m)
        encoders = self.coder.encoders(leaves, at, f"{action}", key)
        self._mail.send(
            tensors, encoders, dst, at.direction, m, action=f"{action}", priority=priority
        )

    def _receive(
        self, leaves: Sequence[LeafSpec], at: Crossing, action: Action, step: Step
    ) -> None:
        src = self._peer(action.stage + _NEIGHBOUR[action.kind], action.microbatch, step)
        arrivals = self.coder.arrivals(leaves, at, self.runner.device)
        self._mail.receive(arrivals, src, at.direction, action.microbatch, f"{action}")

    def _limit_sends(self, direction: int, step: Step) -> None:
        """Waits for all but the latest sends, so that outputs and gradients do not pile up.

        Only where all forwards come before all backwards: what such a send waits for needs
        smaller micro-batches alone, so nothing deadlocks. Under 1F1B with a deep warm-up a peer
        may have to wait for this rank's next forward; there the window is the limit.
        """
        if step.loss_fn is None or self.plan.schedule_kind == "gpipe":
            for m in self._mail.sending(direction)[:-_MAX_SENDS]:
                self._mail.finish_sends_of(direction, m)

    def _finish_old_backward_sends(self, action: Action, step: Step) -> None:
        """Frees gradients that the previous stage must have received by now, under 1F1B.

        That stage runs forward m only after backward j for all j <= m - W, so the arrival of
        its forward m proves that it has its gradients of those j.
        """
        previous, m = action.stage - 1, action.microbatch
        newest = m - self.plan.warmup[previous] if self.plan.schedule_kind == "1f1b" else -1
        src = self._peer(previous, m, step)
        for j in self._mail.sending(BACKWARD):
            if j <= newest and self._peer(previous, j, step) == src:
                self._mail.finish_sends_of(BACKWARD, j)

    def all_spans(self) -> list[Span]:
        """Returns what this rank did in the last call, with its traffic if the transport tells."""
        spans = self._mail.spans
        start_s = min((start for _, _, start, _ in spans), default=0.0)
        return [*spans, *network_spans(self.transport.frames(), start_s, message_name)]

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
        self._mail.handshake.begin(step.key.step, step.header, dst=dst - own, src=src - own)

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
            stamp = self._mail.handshake.stamp
            message = torch.cat([torch.tensor([mine], dtype=torch.float64), stamp])
            for dst in self.members:
                if dst != self.rank:
                    sent = self.transport.send(message, dst, LOSS_TAG, "the loss", priority=URGENT)
                    self._mail.keep(sent)
        self._mail.timed("loss", lambda: self._mail.finish(op for _, op in losses.values()))
        by_rank = {self.rank: mine}
        for src, (message, _) in losses.items():
            self._mail.handshake.compare(message[1:], src)
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
                leaves, device = self._result_spec(m, step).tensors, self.runner.device
                arrivals = [Arrival(leaf, None, device) for leaf in leaves]
                self._mail.receive(arrivals, src, RESULT, m, "the result")

    def _result(self, m: int, step: Step) -> Any:
        if m in step.results:
            return step.results[m]
        return self._result_spec(m, step).fill(self._mail.wait(RESULT, m, "the result"))
