"""The study file: its keys, their types, and what is wrong with them in one line."""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from ssl_vit.errors import UsageError, one_of

TOKENS = {"registers": "r", "cls_tokens": "c", "patch": "p"}  # fields of `backbone` that make a token set, and their letters in names


@dataclass(frozen=True)
class Study:
    """A study file. Every arm is the recipe with one field changed, `readout`, and the seed.

    recipes: names or files, `./FILE` beside the study; trained_with: readout specs; seeds; protocols, read_with: how every arm is
    evaluated; data: on what, entries as in a suite; suites: names of more.
    tokens: token sets, each applied to every recipe, e.g. `{registers: 1}`; none for the recipe's own.
    controls, diagnostics: as `ssl-vit eval` takes them, the latter for the first seed of every arm. margin: points; a smaller
        difference does not matter to this study.
    primary: the one comparison declared in advance: `{recipe: NAME, data: DATASET, protocol: NAME, compare: [SPEC, SPEC]}`.
    slurm: parameters of submitit.
    """

    recipes: list[str]
    trained_with: list[str]
    seeds: list[int]
    protocols: list[str]
    read_with: list[str]
    data: list[Any] = field(default_factory=list)
    suites: list[str] = field(default_factory=list)
    tokens: list[dict[str, int]] = field(default_factory=list)
    controls: list[str] = field(default_factory=list)
    diagnostics: bool = False
    margin: float = 1.0
    primary: dict[str, Any] | None = None
    slurm: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, content: Mapping[str, Any], name: str) -> "Study":
        """UsageError for an unknown or missing key, and for a value of another type than its key takes."""
        known = {field.name: field for field in fields(cls)}
        for key in content:
            if key not in known:
                raise UsageError(f"study {name}: unknown key {key!r}; {one_of(str(key), known)}")
        required = [key for key, field in known.items() if field.default is MISSING and field.default_factory is MISSING]
        values = {**dict.fromkeys(required), **content}
        for key, value in values.items():
            holds, what = _TYPES[key]
            if not holds(value) or (key in required and not value):
                raise UsageError(f"study {name}: {key} is {value!r}; give {what}")
            if isinstance(value, list) and (twice := [item for item in value if value.count(item) > 1]):
                raise UsageError(f"study {name}: {key} names {twice[0]!r} twice; name it once")
        if not content.get("data") and not content.get("suites"):
            raise UsageError(f"study {name}: it has no data; give data or suites, in brackets")
        return cls(**{**values, "margin": float(values.get("margin", 1.0))})


def _list_of(kind: type) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and all(type(item) is kind for item in value)


def _is_token_set(value: object) -> bool:
    return isinstance(value, dict) and bool(value) and all(key in TOKENS and type(item) is int for key, item in value.items())


_NAMES = (_list_of(str), "a list of names in brackets")
_MAPPING: tuple[Callable[[object], bool], str] = (lambda value: isinstance(value, dict), "KEY: VALUE pairs in braces")
_TYPES: dict[str, tuple[Callable[[object], bool], str]] = {
    **dict.fromkeys(("recipes", "trained_with", "protocols", "read_with", "suites", "controls"), _NAMES),
    "seeds": (_list_of(int), "a list of whole numbers in brackets"),
    "data": (lambda value: isinstance(value, list), "a list of names in brackets"),
    "tokens": (
        lambda value: isinstance(value, list) and all(map(_is_token_set, value)),
        f"a list of token sets such as {{registers: 4}}, whole numbers for: {', '.join(TOKENS)}",
    ),
    "diagnostics": (lambda value: type(value) is bool, "true or false"),
    "margin": (
        lambda value: isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 100,
        "a number of points between 0 and 100",
    ),
    "primary": (lambda value: value is None or isinstance(value, dict), _MAPPING[1]),
    "slurm": _MAPPING,
}
