"""Suites: lists of downstream datasets, each with its columns, its official splits and how its pictures are brought to size."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ssl_vit.assets import find_asset, read_yaml
from ssl_vit.data.sources import check_source
from ssl_vit.errors import UsageError, one_of
from ssl_vit_eval.distributed import rank
from ssl_vit_eval.lazy_images import CROP, Crop, EvalTransform
from ssl_vit_eval.splits import Split, load_train_test


@dataclass(frozen=True)
class Dataset:
    """A dataset as it is evaluated.

    Args:
        source: a hub id, a local folder or builtin:NAME.
        train_split: e.g. train+validation; the usual one if not given, as for the next three.
        test_split, image_column, label_column: names in the dataset.
        image_size: side in px, None for each model's own.
        crop: as in `EvalTransform`.
        name: what rows call it; by its source if not given.
    """

    source: str
    train_split: str | None = None
    test_split: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    image_size: int | None = None
    crop: Crop = CROP
    name: str | None = None

    def check(self) -> None:
        """UsageError or Failure for a source that cannot be one; a hub id is asked for when it is loaded."""
        check_source(self.source)

    def transform(self, size: int) -> str:
        """What a row calls the transform to a model of `size` px."""
        return EvalTransform(size, self.crop).name

    def load(self, size: int) -> tuple[Split, Split]:
        """Train and test at `size` px, decoded when asked for; raises as `load_train_test`."""
        names = {key: value for key, value in asdict(self).items() if key not in ("source", "image_size", "name")}
        train, test = load_train_test(self.source, size=size, progress=rank() == 0, **names)
        return (replace(train, dataset=self.name), replace(test, dataset=self.name)) if self.name else (train, test)


_TYPES: dict[str, type] = {field.name: {"image_size": int, "crop": float}.get(field.name, str) for field in fields(Dataset)}
_COMMON = ("image_size", "crop")  # a suite may say them once for all of its datasets


def load_suite(name: str) -> list[Dataset]:
    """The datasets of a suite that comes with ssl_vit, or of the YAML file at this path.

    `data` is a list of names, or of mappings with the fields of `Dataset`; `image_size` and `crop` beside it are for those that do not
    say theirs. A source that begins with a dot starts at the file. UsageError, in one line, for anything else.
    """
    path = find_asset("suites", name)
    content = read_yaml(path)
    common = _checked(f"suite {name}", {key: value for key, value in content.items() if key != "data"}, ("data", *_COMMON))
    entries = content.get("data")
    if not isinstance(entries, list) or not entries:
        raise UsageError(f"suite {name} has data {entries!r}; give a list of names in brackets")
    return [parse_dataset(f"suite {name}, dataset {number}", entry, common, path.parent) for number, entry in enumerate(entries, 1)]


def parse_dataset(where: str, entry: object, common: Mapping[str, Any], folder: Path) -> Dataset:
    if isinstance(entry, str):
        entry = {"source": entry}
    if not isinstance(entry, dict) or "source" not in entry:
        raise UsageError(f"{where} is {entry!r}; give a name, or a mapping with at least a source")
    values = {**common, **_checked(where, entry, tuple(_TYPES))}
    if values["source"].startswith("."):
        # absolute, since `pictures` alone would pass for a hub id where there is no such folder
        values["source"] = str(folder.absolute() / values["source"])
    return Dataset(**values)


def _checked(where: str, content: Mapping[Any, Any], allowed: tuple[str, ...]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in content.items():
        if key not in allowed:
            raise UsageError(f"{where} has the unknown key {key!r}; {one_of(str(key), allowed)}")
        value = float(value) if key == "crop" and type(value) is int else value
        if type(value) is not _TYPES[key] and (key, value) != ("crop", "squash"):
            raise UsageError(
                f"{where}: {key} is {value!r}; it must be of type {_TYPES[key].__name__}" + (" or squash" if key == "crop" else "")
            )
        values[key] = value
    try:
        EvalTransform(values.get("image_size", 1), values.get("crop", CROP))
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error
    return values
