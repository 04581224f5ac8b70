"""How much memory there is to hold images and features in, and where."""

import os
from collections.abc import Iterator
from pathlib import Path

import torch

from ssl_vit.errors import Failure
from ssl_vit_eval.distributed import device, world


def available_memory(root: Path = Path("/")) -> int:
    """Bytes of memory that this process may still take: its share, among the processes of this machine, of what the system has, or its
    control groups leave if that is less.

    Cached files count as available, in a group as in the system: what was read before must not decide what is kept."""
    meminfo = root / "proc/meminfo"
    if not meminfo.exists():  # not Linux: the physical memory is the best that the standard library knows
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = _numbers(meminfo)["MemAvailable:"] * 1024
    for group, (limit, used, prefix) in _control_groups(root):
        if (group / limit).exists() and (group / used).exists() and (most := (group / limit).read_text().strip()) != "max":
            statistics = _numbers(group / "memory.stat")
            cached = statistics[f"{prefix}inactive_file"] + statistics[f"{prefix}active_file"]
            free = min(free, int(most) - int((group / used).read_text()) + cached)
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", world()))


def place_for(needed: int, what: str, advice: str, held: int = 0) -> torch.device:
    """This process's GPU if `needed` bytes are free there, else the CPU if they are available here; a Failure with `advice` else.

    held: bytes that the work takes here in any case."""
    free, available = 0, available_memory() - held
    if device().type == "cuda":
        torch.cuda.empty_cache()  # what torch keeps for itself is free, too
        free = torch.cuda.mem_get_info(device())[0]
        if needed <= free and available >= 0:
            return device()
    if needed > available:
        total, here, gpu = needed + held, available + held, f", {free / 2**30:.1f} GiB of the GPU" if free else ""
        raise Failure(f"{what} works on {total / 2**30:.1f} GiB, {here / 2**30:.1f} GiB of memory{gpu} are available; {advice}")
    return torch.device("cpu")


def _control_groups(root: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """Those that this process is in, from its own up; the files of their limit and use, and a prefix of the names in memory.stat."""
    own, mounted = root / "proc/self/cgroup", root / "sys/fs/cgroup"
    for line in own.read_text().splitlines() if own.exists() else ():
        _, kinds, path = line.split(":", 2)
        if kinds == "":  # version 2
            base, files = mounted, ("memory.max", "memory.current", "")
        elif "memory" in kinds.split(","):
            base, files = mounted / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        else:
            continue
        group = base / path.lstrip("/")
        yield from ((each, files) for each in (group, *group.parents) if each.is_relative_to(base))


def _numbers(file: Path) -> dict[str, int]:
    """The name and the number that each line of a system's file begins with."""
    return {name: int(number) for name, number, *_ in map(str.split, file.read_text().splitlines())}
