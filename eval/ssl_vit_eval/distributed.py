"""Several processes, as `torchrun` starts them: who does which part, and how the parts come together. One process needs none of it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor

from ssl_vit.errors import Failure, UsageError, reason


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def device() -> torch.device:
    """This process's accelerator, or the CPU."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")


@contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that `torchrun` started; does nothing for one process, or where a group exists already."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    # gloo beside nccl: what is exchanged between the CPUs is small. A day, since one rank may fit a probe that the others wait for.
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(days=1))
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def in_memory() -> Iterator[None]:
    """Around work whose failing ends that work alone: where memory runs out, a Failure says so and what was taken is given back."""
    full = ""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        full = reason(error)
    if full:  # not within `except`, whose error would keep the frames, and with them the tensors
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        raise Failure(f"memory ran out ({full}); leave it to a larger machine, or ask for fewer readouts at a time")


@contextmanager
def agreed() -> Iterator[None]:
    """Around work that may fail on one process alone: its UsageError or Failure is then raised on all, which else would wait for it."""
    mine: Exception | None = None
    try:
        with in_memory():
            yield
    except (UsageError, Failure) as error:
        mine = error
    for other in gather_objects(mine):
        if other is not None:
            raise other


def parts(total: int, size: int) -> Iterator[tuple[int, int]]:
    """This process's (start, end) ranges of `range(total)`, cut every `size`: the cuts are the same for any number of processes,
    so that what is computed range by range does not depend on it, and every index is in exactly one range of one process."""
    for number, start in enumerate(range(0, total, size)):
        if number % world() == rank():
            yield start, min(start + size, total)


def merge_parts(mine: Shaped[Tensor, "own *rest"], total: int, size: int) -> Shaped[Tensor, "total *rest"]:
    """What all processes computed over their `parts(total, size)`, concatenated, in the order of the indices; on every process."""
    if world() == 1:
        return mine
    pieces = torch.split(torch.arange(total), size)
    order = torch.cat([piece for owner in range(world()) for piece in pieces[owner :: world()]])
    return torch.cat(gather_objects(mine.cpu()))[order.argsort()].to(mine.device)


def gather_objects(mine: Any) -> list[Any]:
    """One object of every process, in the order of the ranks; on every process."""
    if world() == 1:
        return [mine]
    gathered: list[Any] = [None] * world()
    dist.all_gather_object(gathered, mine)
    return gathered
