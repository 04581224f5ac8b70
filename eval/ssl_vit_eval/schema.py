"""What users write in protocol, suite and study files, checked by pydantic; what is wrong is said in one line, with the nearest name."""

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Annotated, Any, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from ssl_vit.errors import UsageError, one_of

T = TypeVar("T")
# Parameters of protocols. Numbers of a list are int or float, since a whole number that became another would change a protocol's hash.
Count = Annotated[int, Field(gt=0, description="a whole number above 0")]
Whole = Annotated[int, Field(ge=0, description="a whole number of at least 0")]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False, description="a number of at least 0")]
_ABOVE, _FROM = Field(gt=0, allow_inf_nan=False), Field(ge=0, allow_inf_nan=False)
Positives = Annotated[list[Annotated[int, _ABOVE] | Annotated[float, _ABOVE]], Field(min_length=1, description="a list of numbers above 0")]
NotNegatives = Annotated[list[Annotated[int, _FROM] | Annotated[float, _FROM]], Field(min_length=1, description="a list of numbers from 0")]
STRICT = ConfigDict(extra="forbid", strict=True)
_adapter = lru_cache(TypeAdapter)  # building one takes a hundred times as long as checking a row


def checked(kind: type[T], content: object, where: str) -> T:
    """`content`, as YAML gives it, as `kind`: a pydantic model, or a dataclass with `__pydantic_config__ = STRICT`.

    A field's `description` says what to give for it. UsageError for the first thing that is wrong; `where` stands before it."""
    adapter: TypeAdapter[T] = _adapter(kind)  # type: ignore[arg-type]  # mypy does not know that types can be hashed
    try:
        # as JSON, where a list may become a tuple and a whole number a float, and nothing else is converted
        return adapter.validate_json(json.dumps(content, default=str))
    except ValidationError as error:
        # a misspelt key before the one that is missing for it
        problem: Any = min(error.errors(include_url=False), key=lambda problem: problem["type"].startswith("missing"))
        fields = adapter.json_schema()["properties"]
        raise UsageError(f"{where}{_sentence(problem, content, fields)}") from error


def unique(values: Sequence[Any]) -> Sequence[Any]:
    """For pydantic's AfterValidator: ValueError for a list that names something twice."""
    if twice := [value for value in values if values.count(value) > 1]:
        raise ValueError(f"names {twice[0]!r} twice; name it once")
    return values


def _sentence(problem: dict[str, Any], content: Any, fields: dict[str, Any]) -> str:
    if not problem["loc"]:
        return f" is {content!r}; give a mapping with the keys {', '.join(fields)}"
    key = str(problem["loc"][0])
    give = fields.get(key, {}).get("description", "")
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f" has the unknown key {key!r}; {one_of(key, fields)}"
    if problem["type"].startswith("missing") and len(problem["loc"]) == 1:  # else an item of a list
        return f" lacks the key {key!r}; add it" + (f": {give}" if give else "")
    if problem["type"] == "value_error":
        return f": {key} {problem['ctx']['error']}"
    what = f"give {give}" if give else problem["msg"].replace("Input", "it")
    # YAML reads 1e-4 as text
    hint = " (0.0001 or 1.0e-4, not 1e-4)" if problem["type"] == "float_type" and isinstance(content[key], str) else ""
    return f": {key} is {content[key]!r}; {what}{hint}"
