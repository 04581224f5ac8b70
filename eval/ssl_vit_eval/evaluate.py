"""`ssl-vit eval`: sources x datasets x readouts x protocols, into rows. What is there already is skipped."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ssl_vit.assets import find_asset, read_yaml
from ssl_vit.errors import UsageError
from ssl_vit.provenance import git_revision
from ssl_vit.sources import Split, check_source, load_train_test
from ssl_vit_eval.features import extract
from ssl_vit_eval.models import PIXELS, Source, open_source
from ssl_vit_eval.protocols import Protocol, Result, load_protocol, run_protocol
from ssl_vit_eval.rows import Key, Row, RowStore
from ssl_vit_eval.stats import macro_interval, wilson_interval

METRICS = ("top1", "top1_macro")


@dataclass(frozen=True)
class DataOptions:
    """Names in a dataset that do not follow the usual ones."""

    train_split: str | None = None
    test_split: str | None = None
    image_column: str | None = None
    label_column: str | None = None


def open_sources(names: Sequence[str]) -> list[Source]:
    return [open_source(name) for name in names]


def suite(name: str) -> list[str]:
    """The data of a suite; UsageError for an unknown one, or one without a list of names."""
    data = read_yaml(find_asset("suites", name)).get("data")
    if not isinstance(data, list) or not data or not all(isinstance(item, str) for item in data):
        raise UsageError(f"suite {name} has data {data!r}; give a list of names in brackets")
    return data


def evaluate(
    sources: Sequence[Source],
    data: Sequence[str],
    protocols: Sequence[str],
    readouts: Sequence[str] | None,
    out: str | Path,
    options: DataOptions = DataOptions(),
    say: Callable[[str], None] = print,
) -> RowStore:
    """Every combination that `out` does not hold yet, one row a metric; the store of all of them.

    readouts None: each single readout that a source has. Raises UsageError before any work for names that are wrong."""
    rules = [load_protocol(name) for name in protocols]
    if all(source.backbone is None for source in sources) and not any(rule.kind == "knn" for rule in rules):
        raise UsageError(f"raw pixels are a floor for k-NN only, got {', '.join(protocols)}; choose the protocol knn or add a source")
    for dataset in data:
        check_source(dataset)
    trained = [source.trained_with for source in sources if source.trained_with]
    wanted = [source.readouts(readouts, trained) for source in sources]
    store = open_store(out)
    for source in sources:
        if source.backbone is not None and source.trained_with:
            say(f"{source.name}: {source.method}, trained with {source.trained_with}")
    for dataset in data:
        splits: dict[int, tuple[Split, Split]] = {}  # by image size: sources of one size share the decoded pictures
        for source, specs in zip(sources, wanted, strict=True):
            if source.image_size not in splits:
                splits[source.image_size] = load_train_test(dataset, size=source.image_size, **vars(options))
                for notice in dict.fromkeys(notice for split in splits[source.image_size] for notice in split.notices):
                    print(notice, flush=True)
            train, test = splits[source.image_size]
            evaluate_source(source, train, test, rules, specs, store, say)
    say(f"rows: {store.file}")
    return store


def evaluate_source(
    source: Source,
    train: Split,
    test: Split,
    rules: Sequence[Protocol],
    specs: Sequence[str],
    store: RowStore,
    say: Callable[[str], None],
) -> None:
    """One source on one dataset: one pass over each split for all readouts that are missing somewhere."""
    rules = [rule for rule in rules if source.backbone is not None or rule.kind == "knn"]  # raw pixels are a floor for k-NN only

    def key(rule: Protocol, spec: str) -> Key:
        return Key(source.weights, train.fingerprint + test.fingerprint, f"resize{source.image_size}", rule.name, rule.version, spec)

    missing = [(rule, spec) for spec in specs for rule in rules if not all(store.has(key(rule, spec), metric) for metric in METRICS)]
    if not missing:
        say(f"{source.name} on {train.dataset}: done before")
        return
    needed = [spec for spec in specs if any(spec == other for _, other in missing)]
    x_train = extract(source, train.images, needed, f"{source.name}: {train.dataset} train")
    x_test = extract(source, test.images, needed, f"{source.name}: {test.dataset} test")
    assert train.labels is not None
    assert test.labels is not None
    for rule, spec in missing:
        result = run_protocol(rule, x_train[spec], train.labels, x_test[spec], test.labels, train.selection)
        rows = make_rows(source, key(rule, spec), result, train, test)
        store.append(rows, result.predictions, test.labels)
        what = source.name if spec == PIXELS else f"{source.name} read with {spec}"
        percent, low, high = (100 * number for number in (rows[0].value, rows[0].ci_low, rows[0].ci_high))
        edge = "  (the selected value is on the edge of its grid)" if result.edge_of_grid else ""
        say(f"{what}, {train.dataset}, {rule.name}: {percent:.1f} % [{low:.1f}, {high:.1f}]{edge}")


def make_rows(source: Source, key: Key, result: Result, train: Split, test: Split) -> list[Row]:
    """The two numbers of one evaluation: top-1 over images (Wilson interval) and over classes (bootstrap within classes)."""
    assert test.labels is not None
    correct = result.predictions == test.labels
    values = {"top1": (result.accuracy, wilson_interval(int(correct.sum()), len(correct)))}
    values["top1_macro"] = (result.macro, macro_interval(correct, test.labels))
    return [
        Row(
            method=source.method,
            trained_with=source.trained_with,
            read_with=key.read_with,
            dataset=train.dataset,
            protocol=key.protocol,
            protocol_version=key.protocol_version,
            metric=metric,
            value=value,
            ci_low=interval.low,
            ci_high=interval.high,
            n_train=len(train.images),
            n_test=len(test.images),
            seed=source.seed,
            selected=result.selected,
            grid=result.grid,
            edge_of_grid=result.edge_of_grid,
            oracle=result.oracle if metric == "top1" else None,
            deviations=[],
            seconds=round(result.seconds, 3),
            checkpoint=source.weights,
            recipe=source.recipe,
            family=source.family,
            init=source.init,
            data=key.data,
            transform=key.transform,
            git=git_revision(),
            source=source.name,
        )
        for metric, (value, interval) in values.items()
    ]


def open_store(out: str | Path) -> RowStore:
    """The store in `out`; UsageError if that is a file or a folder that holds something else."""
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / "rows.jsonl").exists())):
        raise UsageError(f"{out} already holds something else; name another folder with --out")
    return RowStore(folder)
