"""Collectives of torch.distributed, safe in a world of one, and the way out of a rank.

Shapes: N local rows, M gathered rows, E embedding width, W ranks.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from coma_ds.rank_report import CONTROL

log = logging.getLogger("coma_ds")

Result = TypeVar("Result")


def is_parallel() -> bool:
    """True when a process group of more than one rank is up."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """This rank, 0 in a world of one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks, 1 in a world of one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_sum(values: torch.Tensor) -> torch.Tensor:
    """Element-wise sum of ``values`` over the ranks (a new tensor, no gradient)."""
    total = values.detach().clone()
    if is_parallel():
        dist.all_reduce(total)
    return total


def all_max(value: int, device: torch.device | str = "cpu") -> int:
    """The largest ``value`` of all ranks."""
    if not is_parallel():
        return value
    cell = torch.tensor([value], dtype=torch.int64, device=device)
    dist.all_reduce(cell, op=dist.ReduceOp.MAX)
    return int(cell)


def broadcast(value: Any) -> Any:
    """Rank 0's picklable ``value``, on every rank."""
    if not is_parallel():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def port_in_use() -> str:
    """What to say where another process has the launcher's port."""
    whose = "job another one (COMA_MASTER_PORT)"
    if CONTROL not in os.environ:
        whose = "launcher another one (--master_port)"
    port = os.environ.get("MASTER_PORT", "")
    return f"port {port} is in use on this machine, maybe by another run: give the {whose}"


def decide(call: Callable[[], Result]) -> Result:
    """What ``call()`` gives on rank 0, where alone it runs, on every rank (picklable).

    A ``ValueError`` of it is raised on every rank, so that none waits for the others.
    """
    result: Any = None
    if rank() == 0:
        try:
            result = call()
        except ValueError as error:
            result = error
    result = broadcast(result)
    if isinstance(result, ValueError):
        raise result
    return result


def all_objects(value: Any) -> list[Any]:
    """The picklable ``value`` of every rank, in rank order."""
    if not is_parallel():
        return [value]
    box: list[Any] = [None] * world_size()
    dist.all_gather_object(box, value)
    return box


def barrier() -> None:
    """Wait for every rank."""
    if is_parallel():
        dist.barrier()


def row_counts(rows: int, device: torch.device | str = "cpu") -> list[int]:
    """Rows that each rank holds, in rank order."""
    if not is_parallel():
        return [rows]
    counts = torch.zeros(world_size(), dtype=torch.int64, device=device)
    counts[rank()] = rows
    dist.all_reduce(counts)
    return counts.tolist()


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: torch.Tensor, counts: list[int]) -> torch.Tensor:
        ctx.counts = counts
        tallest = max(counts)
        padded = rows.new_zeros((tallest, *rows.shape[1:]))
        padded[: len(rows)] = rows
        gathered = rows.new_empty((tallest * len(counts), *rows.shape[1:]))
        dist.all_gather_into_tensor(gathered, padded)
        if min(counts) == tallest:
            return gathered
        return torch.cat([part[:n] for part, n in zip(gathered.split(tallest), counts)])

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        counts, tallest = ctx.counts, max(ctx.counts)
        padded = grad.new_zeros((tallest * len(counts), *grad.shape[1:]))
        for block, part in zip(padded.split(tallest), grad.split(counts)):
            block[: len(part)] = part
        own = grad.new_empty((tallest, *grad.shape[1:]))
        dist.reduce_scatter_tensor(own, padded)
        return own[: counts[rank()]], None


def gather_rows(rows: torch.Tensor, counts: list[int] | None = None) -> torch.Tensor:
    """Rows of all ranks in rank order: [N, ...] -> [M, ...], N may differ between ranks.

    The backward sums the gradients of all ranks and returns the own slice, the convention that
    makes DeepSpeed's mean over ranks the gradient of the global mean (see ``objectives.match``).
    ``counts`` are the rows of each rank, if the caller has them (else one all-reduce more).
    """
    if not is_parallel():
        return rows
    counts = counts or row_counts(len(rows), rows.device)
    return _GatherRows.apply(rows.contiguous(), counts)


def leave(code: int) -> NoReturn:
    """End this rank with ``code``: flush, destroy the group, and skip the interpreter's teardown.

    A gloo rank that ends through the interpreter aborts now and then (SIGABRT in a thread that
    outlives its group), which turns a finished run into a failed one.  The loader's workers are
    ended here too: they would hold the terminal for seconds.
    """
    if code == 0 and is_parallel():
        try:
            dist.barrier()
        except RuntimeError:  # another rank has failed and is gone
            code = 1
    workers = multiprocessing.active_children()
    if workers:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch raises when a worker is ended
        for worker in workers:
            worker.kill()  # below a batch script SIGTERM is blocked
    streams = (*logging.getLogger().handlers, *log.handlers, sys.stdout, sys.stderr)
    for stream in streams:
        with suppress(OSError, ValueError):  # whoever read it may be gone
            stream.flush()
    if dist.is_available() and dist.is_initialized() and code == 0:
        dist.destroy_process_group()
    os._exit(code)
