"""torch.compile where `backbone.compile` asks for it, in training: each block on its own, and what passes over pixels and prototypes."""

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import nn

Function = TypeVar("Function", bound=Callable[..., Any])
_fusing = False


@functools.cache
def compiles(device: str) -> bool:
    """Whether a small function compiles for this kind of device; a warning where it does not: all then runs plain."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(1, device=device))
    except Exception as error:  # whatever a missing compiler, its headers or its driver raise
        warnings.warn(f"backbone.compile: nothing compiles here ({type(error).__name__}); all runs plain", stacklevel=2)
        return False
    return True


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Each on its own: keys unchanged, and all blocks share what is compiled."""
    blocks = list(blocks)
    # grids x (teacher, student, evaluation) x rates of drop path
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 16 * len(blocks))
    for block in blocks:
        block.compile(options={"fallback_random": True})  # drop path draws what it draws uncompiled


def fusible(function: Function) -> Function:
    """Within `fusing`, one kernel instead of one an operation: what only reads and writes memory takes a fraction of the time.

    Not for what must be the same in a worker and on a device, such as the boxes of crops: it is equal within rounding."""

    @functools.cache
    def compiled() -> Callable[..., Any]:
        return torch.compile(function, dynamic=True)

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        return (compiled() if _fusing and not torch.compiler.is_compiling() else function)(*args)

    return cast(Function, run)


@contextmanager
def fusing(on: bool) -> Iterator[None]:
    """Compile, or not, the `fusible` functions that are called within."""
    global _fusing
    before, _fusing = _fusing, on
    try:
        yield
    finally:
        _fusing = before
