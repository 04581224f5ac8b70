"""Suites: lists of downstream datasets, each with its columns, its official splits and how its images are brought to size."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from ssl_vit.assets import find_asset, read_yaml
from ssl_vit.data.sources import check_source
from ssl_vit_eval.distributed import rank
from ssl_vit_eval.lazy_images import CROP, EvalTransform
from ssl_vit_eval.metrics import METRICS
from ssl_vit_eval.schema import STRICT, checked
from ssl_vit_eval.splits import Split, load_train_test

_Size = Annotated[int | None, Field(gt=0, description="a side in pixels, above 0")]
_Share = Annotated[float, Field(gt=0, le=1)]
_Metric = Annotated[Literal["top1", "top1_macro"] | None, Field(description=" or ".join(METRICS))]
_CROP = Field(description="a share above 0 and up to 1, or squash")


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
        metric: of `metrics.METRICS`, what the comparison judges it by; decided by its name if not given.
    """

    __pydantic_config__ = STRICT
    source: str
    train_split: str | None = None
    test_split: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    image_size: _Size = None
    crop: Annotated[_Share | Literal["squash"], _CROP] = CROP
    name: str | None = None
    metric: _Metric = None

    def check(self) -> None:
        """UsageError or Failure for a source that cannot be one; a hub id is asked for when it is loaded."""
        check_source(self.source)

    def transform(self, size: int) -> str:
        """What a row calls the transform to a model of `size` px."""
        return EvalTransform(size, self.crop).name

    def load(self, size: int) -> tuple[Split, Split]:
        """Train and test at `size` px, decoded when asked for; raises as `load_train_test`."""
        names = {key: value for key, value in asdict(self).items() if key not in ("source", "image_size", "name", "metric")}
        train, test = load_train_test(self.source, size=size, progress=rank() == 0, **names)
        return replace(train, dataset=self.name or train.dataset), replace(test, dataset=self.name or test.dataset, metric=self.metric)


@dataclass(frozen=True)
class _Suite:
    """What a suite's file holds. image_size, crop: of the datasets that do not say theirs."""

    __pydantic_config__ = STRICT
    data: Annotated[list[Any], Field(min_length=1, description="a list of names in brackets")]
    image_size: _Size = None
    crop: Annotated[_Share | Literal["squash"] | None, _CROP] = None


def load_suite(name: str) -> list[Dataset]:
    """The datasets of a suite that comes with ssl_vit, or of the YAML file at this path.

    `data` is a list of names, or of mappings with the fields of `Dataset`; `image_size` and `crop` beside it are for those that do not
    say theirs. A source that begins with a dot starts at the file. UsageError, in one line, for anything else.
    """
    path = find_asset("suites", name)
    suite = checked(_Suite, read_yaml(path), f"suite {name}")
    common = {key: value for key, value in (("image_size", suite.image_size), ("crop", suite.crop)) if value is not None}
    return [parse_dataset(f"suite {name}, dataset {number}", entry, common, path.parent) for number, entry in enumerate(suite.data, 1)]


def parse_dataset(where: str, entry: object, common: Mapping[str, Any], folder: Path) -> Dataset:
    """A name, or a mapping with the fields of `Dataset`, as that; `common` for what it does not say, `folder` where `./` starts."""
    entry = {"source": entry} if isinstance(entry, str) else entry
    dataset = checked(Dataset, {**common, **entry} if isinstance(entry, dict) else entry, where)
    # absolute, since `insects` alone would pass for a hub id where there is no such folder
    return replace(dataset, source=str(folder.absolute() / dataset.source)) if dataset.source.startswith(".") else dataset
