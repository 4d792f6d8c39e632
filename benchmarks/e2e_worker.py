"""One device of `bench_e2e.py`: does what the benchmark asks over the pipe it was started with.

All contenders of a task live in the same processes and take turns, step by step.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from e2e_tasks import TASKS, Task
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.nn.parallel import DistributedDataParallel

from dora import DoraParallel
from dora.partition import partition
from dora.profiler import profile_model
from dora.runtime.overhead import measure_overhead
from dora.runtime.process_group import register
from dora.spec import Plan, Timeline

# A rival may take long; who is slower than this for one step has lost.
TIMEOUT_S = 90.0
_M_MMAP_THRESHOLD = -3  # malloc.h
# How long a device is watched to know how fast it is now.
_PROBE_S = 0.15


class Dora:
    """Any planner's plan, run by Dora's executor."""

    def __init__(self, task: Task, transport: str, plan: Plan) -> None:
        self.task, self.plan = task, plan
        inputs, _ = task.batch(0)
        last = plan.ranks(len(plan.stages) - 1)
        self.model = DoraParallel(
            task.model(),
            plan,
            sample=inputs,
            transport=transport,
            timeout_s=TIMEOUT_S,
            outputs_to=last[0],
            memory_limit_bytes=1 << 40,
        )

    def run(self, inputs: torch.Tensor, targets: torch.Tensor) -> float:
        """Runs a step or a request; returns the loss where it is known."""
        if self.task.is_training:
            return float(self.model.step(inputs, targets, self.task.loss_fn))
        with torch.no_grad():
            self.model(inputs)
        return float("nan")

    def zero(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = None

    def close(self) -> None:
        self.model.transport.close()


class TorchPipeline:
    """torch.distributed.pipelining with as many blocks on each device as possible, on gloo."""

    def __init__(self, task: Task, transport: str, plan: Plan) -> None:
        self.task = task
        rank, size = dist.get_rank(), dist.get_world_size()
        model = task.model()
        edges = [round(len(model) * i / size) for i in range(size + 1)]
        self.own = model[edges[rank] : edges[rank + 1]]
        self.is_first, self.is_last = rank == 0, rank == size - 1
        batch_size = task.workload.batch_size
        m = max(n for n in range(1, 2 * size + 1) if batch_size % n == 0)
        stage = PipelineStage(self.own, rank, size, torch.device("cpu"))
        if task.is_training:
            self.schedule: Any = Schedule1F1B(
                stage, m, loss_fn=lambda o, t: task.loss_fn(o, t) / m, scale_grads=False
            )
        else:
            self.schedule = ScheduleGPipe(stage, m)

    def run(self, inputs: torch.Tensor, targets: torch.Tensor) -> float:
        """Runs a step or a request; returns the loss on the last rank."""
        given = (inputs,) if self.is_first else ()
        if not self.task.is_training:
            with torch.no_grad():
                self.schedule.eval(*given)
            return float("nan")
        if not self.is_last:
            self.schedule.step(*given)
            return float("nan")
        losses: list[torch.Tensor] = []
        self.schedule.step(*given, target=targets, losses=losses, return_outputs=False)
        return float(sum(loss.item() for loss in losses))

    def zero(self) -> None:
        self.own.zero_grad()

    def close(self) -> None:
        pass


class DDP:
    """torch's data parallelism: equal shares of the batch, on gloo or the engine."""

    def __init__(self, task: Task, transport: str, plan: Plan) -> None:
        self.task = task
        self.group = dist.new_group(timeout=timedelta(seconds=TIMEOUT_S), backend=transport)
        self.model = DistributedDataParallel(task.model(), process_group=self.group)

    def run(self, inputs: torch.Tensor, targets: torch.Tensor) -> float:
        """Runs a step on this rank's share; its loss is that of the share."""
        rank, size = dist.get_rank(), dist.get_world_size()
        mine = slice(len(inputs) * rank // size, len(inputs) * (rank + 1) // size)
        loss = self.task.loss_fn(self.model(inputs[mine]), targets[mine])
        loss.backward()
        return float("nan")

    def zero(self) -> None:
        self.model.zero_grad()

    def close(self) -> None:
        dist.destroy_process_group(self.group)


KINDS = {"plan": Dora, "torch-pipeline": TorchPipeline, "ddp": DDP}


class Worker:
    """What the benchmark can ask for; every method but `profile` is a collective call."""

    def __init__(self) -> None:
        self.contenders: dict[str, Any] = {}
        self.batches: list[Any] = []
        self.probes: dict[str, Any] = {}

    def join(self, environment: dict[str, str]) -> None:
        """Joins the other devices."""
        os.environ.update(environment)
        register()
        dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT_S))

    def profile(self, task_name: str, device: str, sizes: list[int]) -> str:
        """Measures the blocks on this device, within its quota."""
        task = TASKS[task_name]
        inputs, targets = task.batch(0)
        chain = partition(task.model(), (inputs,))
        return profile_model(
            chain,
            (inputs,),
            device_name=device,
            microbatch_sizes=sizes,
            training=task.is_training,
            loss_fn=task.loss_fn if task.is_training else None,
            targets=targets if task.is_training else None,
            warmup=1,
            name=task.name,
            overhead=measure_overhead,
        ).to_json()

    def pass_s(self, task_name: str) -> float:
        """Returns the processor seconds of a sample's forward pass, as fast as this device is now.

        Machines drift within seconds; this tells how far from what was profiled.
        """
        task = TASKS[task_name]
        if task_name not in self.probes:
            self.probes[task_name] = task.model().eval(), task.batch(0)[0][:1]
        model, sample = self.probes[task_name]
        with torch.no_grad():
            model(sample)
            count, end_s, start_s = 0, time.perf_counter() + _PROBE_S, time.thread_time()
            while not count or time.perf_counter() < end_s:
                model(sample)
                count += 1
        return (time.thread_time() - start_s) / count

    def build(self, name: str, kind: str, task_name: str, transport: str, plan: str) -> None:
        """Adds a contender."""
        task = TASKS[task_name]
        self.batches = self.batches or [task.batch(i) for i in range(4)]
        given = Plan.from_json(plan) if plan else None
        self.contenders[name] = KINDS[kind](task, transport, given)

    def run(self, name: str, count: int, gap_s: float = 0.0) -> list[tuple[float, float]]:
        """Runs steps or requests; returns (seconds, loss) of each on this rank.

        With a gap, requests arrive that far apart and wait for the one before; their time counts
        from their arrival.
        """
        contender, found = self.contenders[name], []
        dist.barrier()
        start_s = time.perf_counter()
        for i in range(count):
            inputs, targets = self.batches[i % len(self.batches)]
            if gap_s:
                arrival_s = start_s + i * gap_s
                time.sleep(max(0.0, arrival_s - time.perf_counter()))
            else:
                dist.barrier()
                arrival_s = time.perf_counter()
            loss = contender.run(inputs, targets)
            found.append((time.perf_counter() - arrival_s, loss))
            contender.zero()
        return found

    def timeline(self, name: str) -> str:
        """Returns what happened in the last step of one of Dora's."""
        timeline: Timeline = self.contenders[name].model.timeline()
        return timeline.to_json()

    def codecs(self, name: str) -> tuple[float | None, str]:
        """Returns the accuracy loss of the codecs of one of Dora's, and what is decided of them."""
        contender = self.contenders[name]
        report = contender.model.codec_report
        state = report.training if contender.task.is_training else report.inference
        return state.accuracy_loss, f"{state}"

    def memory(self, kind: str, task_name: str, transport: str, plan: str) -> int:
        """Returns by how many bytes a contender's two steps raise this process's peak."""
        task, batch = TASKS[task_name], TASKS[task_name].batch(0)
        # Freed memory goes back at once, or the peak would depend on what ran before. A thread of
        # its own has its own heap: this one is full of holes of all that has been imported, which
        # tensors would be scattered over.
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 64 << 10)
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        contender = KINDS[kind](task, transport, Plan.from_json(plan))
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        state_bytes = sum(
            p.numel() * p.element_size() for p in contender.model.parameters() if p.numel()
        )
        before = _resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        with ThreadPoolExecutor(1) as thread:
            for _ in range(2):
                dist.barrier()
                thread.submit(contender.run, *batch).result()
            peak = _resident("VmHWM")
        contender.close()
        return state_bytes + peak - before

    def close(self) -> None:
        """Drops all contenders."""
        dist.barrier()
        for contender in self.contenders.values():
            contender.close()
        self.contenders, self.batches = {}, []
        gc.collect()


def _resident(field: str) -> int:
    rows = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return next(int(row[1]) * 1024 for row in rows if row[0] == f"{field}:")


def serve(end: Connection) -> None:
    """Answers (method, arguments) with (result, error), until the other end closes."""
    worker = Worker()
    end.send((None, ""))
    while True:
        try:
            method, arguments = end.recv()
        except EOFError:
            return
        call: Callable[..., Any] = getattr(worker, method)
        try:
            end.send((call(*arguments), ""))
        except Exception:
            end.send((None, traceback.format_exc()))


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(Connection(int(sys.argv[1])))
    os._exit(0)  # a rank whose peers are gone must not wait for them in a destructor
