"""The kinds of error that a user meets. Each message is one line: what came, what is allowed, what to change."""

import difflib
import signal
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


class UsageError(ValueError):
    """Something typed is wrong: a name, a key, a combination, an output folder in use. The command exits with code 2."""


class Failure(RuntimeError):
    """Something found is wrong: a corrupt image, a broken checkpoint, no network. The command exits with code 1."""


class OtherVersion(Failure):
    """Written by a version of ssl-vit that this one cannot read: whole, and of use to that version."""


class Interrupted(Exception):
    """Ctrl-C, or a scheduler's signal, after what was finished was saved. The command exits with 128 + its number: 130, 143."""

    def __init__(self, message: str, number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.number = number


def one_of(name: str, options: Iterable[str], more: Iterable[str] = ()) -> str:
    """`"choose one of: a, b"`, led by the nearest option, or of `more`, which are not listed, when `name` looks like a misspelt one."""
    known = sorted(options)
    near = difflib.get_close_matches(name, [*known, *more], n=1, cutoff=0.6)
    return (f"did you mean {near[0]!r}? " if near else "") + "choose one of: " + ", ".join(known)


def near_path(path: Path, folders: bool = False, more: Iterable[str] = ()) -> str:
    """`"did you mean 'runs/alpha'? "`, or "": the nearest name among the neighbours of `path` (folders only, if asked) and `more`."""
    names = [*(entry.name for entry in path.parent.glob("*") if entry.is_dir() or not folders), *more]
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.6)
    return f"did you mean {str(path.with_name(near[0]))!r}? " if near else ""


def reason(error: BaseException) -> str:
    """The first sentence of what an error says, or its kind."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].split(". ")[0]


def require(holds: bool, field: str, value: object, allowed: str) -> None:
    """UsageError unless `holds`: what `field` is, and what it must be."""
    if not holds:
        raise UsageError(f"{field} is {value}; it must be {allowed}")


def check_numbers(group: str, values: Mapping[str, Any], **types: Any) -> None:
    """UsageError for the first of `values` that is not of its number type, one of jsonargparse's; None passes, of a tuple every number
    is looked at. group: what stands before a field's name in a recipe.

    Checked here, and not by annotations: a plain 224 is no instance of PositiveInt, which would refuse `SingleCrop(size=224)` in Python."""
    for field, kind in types.items():
        value = values[field]
        for number in value if isinstance(value, tuple | list) else (value,):
            try:
                number is None or kind(number)
            except ValueError as error:
                raise UsageError(f"{group}{field} is {value}; it must be {kind.__doc__.split('restricted to be ')[1]}") from error


def check_low_high(group: str, values: Mapping[str, Any], **types: Any) -> None:
    """The same of pairs, of which the first number must not be above the second."""
    check_numbers(group, values, **types)
    for field in types:
        require(values[field][0] <= values[field][1], f"{group}{field}", values[field], "low, then high")
