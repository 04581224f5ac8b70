"""The study file: its keys, and what each may hold."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, Field

from ssl_vit_eval.compare.verdict import Scope, Test
from ssl_vit_eval.schema import STRICT, unique

TOKENS = {"registers": "r", "cls_tokens": "c", "patch": "p"}  # fields of `backbone` that make a token set, and their letters in names

_UNIQUE = AfterValidator(unique)
_Names = Annotated[list[str], _UNIQUE, Field(description="a list of names in brackets")]
_Some = Field(min_length=1)
_TokenSet = Annotated[dict[Literal["registers", "cls_tokens", "patch"], int], _Some]
_TOKEN_SETS = f"a list of token sets such as {{registers: 4}}, whole numbers for: {', '.join(TOKENS)}"


@dataclass(frozen=True)
class Study:
    """A study file. Every arm is the recipe with one field changed, `readout`, and the seed.

    recipes: names or files, `./FILE` beside the study; trained_with: readout specs; seeds; protocols, read_with: how every arm is
    evaluated; data: on what, entries as in a suite; suites: names of more.
    tokens: token sets, each applied to every recipe, e.g. `{registers: 1}`; none for the recipe's own.
    controls, diagnostics: as `ssl-vit eval` takes them, the latter for the first seed of every arm.
    margin, level, test, family: how verdicts are made, as `Rule` says.
    primary: the one comparison declared in advance: `{recipe: NAME, data: DATASET, protocol: NAME, compare: [SPEC, SPEC]}`.
    slurm: parameters of submitit.
    """

    __pydantic_config__ = STRICT
    recipes: Annotated[_Names, _Some]
    trained_with: Annotated[_Names, _Some]
    seeds: Annotated[list[int], _UNIQUE, Field(min_length=1, description="a list of whole numbers in brackets")]
    protocols: Annotated[_Names, _Some]
    read_with: Annotated[_Names, _Some]
    data: Annotated[list[Any], _UNIQUE, Field(description="a list of names in brackets")] = field(default_factory=list)
    suites: _Names = field(default_factory=list)
    tokens: Annotated[list[_TokenSet], _UNIQUE, Field(description=_TOKEN_SETS)] = field(default_factory=list)
    controls: _Names = field(default_factory=list)
    diagnostics: Annotated[bool, Field(description="true or false")] = False
    margin: Annotated[float, Field(gt=0, lt=100, description="a number of points between 0 and 100")] = 1.0
    level: Annotated[float, Field(gt=0, le=0.05, description="a number above 0, at most 0.05")] = 0.05
    test: Annotated[Test, Field(description=f"one of: {', '.join(get_args(Test))}")] = "sign-flip"
    family: Annotated[Scope, Field(description=f"one of: {', '.join(get_args(Scope))}")] = "study"
    primary: Annotated[dict[str, Any] | None, Field(description="KEY: VALUE pairs in braces")] = None
    slurm: Annotated[dict[str, Any], Field(description="KEY: VALUE pairs in braces")] = field(default_factory=dict)


@dataclass(frozen=True)
class Declared:
    """What `primary` holds: two arms of a recipe, as cells call it, each read as it was trained."""

    __pydantic_config__ = STRICT
    recipe: str
    data: str
    protocol: str
    compare: Annotated[tuple[str, str], Field(description="two readouts in brackets")]
