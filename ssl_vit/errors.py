"""The two kinds of error that a user meets. Each message is one line: what came, what is allowed, what to change."""

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """Something typed is wrong: a name, a key, a combination, an output folder in use. The command exits with code 2."""


class Failure(RuntimeError):
    """Something found is wrong: a corrupt picture, a broken checkpoint, no network. The command exits with code 1."""


def one_of(name: str, options: Iterable[str]) -> str:
    """`"choose one of: a, b"`, led by the nearest option when `name` looks like a misspelt one."""
    known = sorted(options)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return (f"did you mean {near[0]!r}? " if near else "") + "choose one of: " + ", ".join(known)


def reason(error: BaseException) -> str:
    """The first line of what an error says, or its kind."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def require(holds: bool, field: str, value: object, allowed: str) -> None:
    """UsageError unless `holds`: what `field` is, and what it must be."""
    if not holds:
        raise UsageError(f"{field} is {value}; it must be {allowed}")
