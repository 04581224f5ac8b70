"""`ssl-vit eval`: sources x datasets x readouts x protocols x controls, into rows. What is there already is skipped."""

from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from ssl_vit.errors import Failure, Interrupted, UsageError
from ssl_vit.files import check_writable
from ssl_vit.model.readout import ReadoutSpec, available
from ssl_vit.train.tracking import Tracking
from ssl_vit_eval.controls import check_controls
from ssl_vit_eval.distributed import rank
from ssl_vit_eval.evaluation import Evaluation, Images, Referee, Say, Specs
from ssl_vit_eval.features.extract import read_all
from ssl_vit_eval.protocols import Protocol, load_protocols
from ssl_vit_eval.rows import RowStore
from ssl_vit_eval.sources import Source
from ssl_vit_eval.suites import Dataset
from ssl_vit_eval.tracking import track_rows


def evaluate(
    sources: Sequence[Source],
    data: Sequence[Dataset],
    protocols: Sequence[str],
    readouts: Sequence[str] | None,
    out: str | Path,
    controls: Sequence[str] = (),
    cache: str | Path | None = None,
    diagnostics: bool = False,
    say: Say = print,
    tracking: Tracking | None = None,
) -> RowStore:
    """Every combination that `out` does not hold yet, one row a metric; the store of all of them.

    readouts None: each single readout that a source has and, for protocols that train one, each learned readout. controls: of
    `controls.CONTROLS`. cache: the folder of the features, None for `features` in `out`. diagnostics: as `diagnostics.run.examine`.
    tracking: where W&B shows every source's rows, as `ssl_vit_eval.tracking` says.
    Raises UsageError before any work for names that are wrong. A dataset that cannot be evaluated is said and left out, and raises
    Failure at the end; the only one raises at once. On several processes (torchrun) all call it, the first one writes and speaks.
    """
    rules = load_protocols(protocols)
    check_controls(controls)
    if controls and not any(rule.reads == "features" for rule in rules):
        raise UsageError(f"--controls change features, which {', '.join(protocols)} do not read; add a protocol such as knn or logreg")
    if "width" in controls and all(rule.kind == "knn" for rule in rules if rule.reads == "features"):
        raise UsageError("--controls width asks what fitted weights owe to their number, and k-NN fits none; add a protocol such as logreg")
    if diagnostics and not any(rule.kind == "knn" for rule in rules):
        raise UsageError("--diagnostics reads every block by k-NN; add a protocol of that kind, e.g. knn")
    if all(source.backbone is None for source in sources) and not any(rule.kind == "knn" for rule in rules):
        raise UsageError(f"raw pixels are a floor for k-NN only, got {', '.join(protocols)}; choose the protocol knn or add a source")
    for dataset in data:
        dataset.check()
    trained = [source.trained_with for source in sources if source.trained_with]
    wanted = [wanted_specs(source, rules, readouts, trained) for source in sources]
    store = open_store(out)
    store.rows()  # a damaged line is said before any work

    def tell(line: str) -> None:
        with tqdm.external_write_mode():  # bars stand below what is said
            say(line)

    referee = Referee(rules, controls, diagnostics, store, Path(cache) if cache else store.folder / "features", tell)
    for source in sources:
        if source.backbone is not None and source.trained_with:
            referee.say(f"{source.name}: {source.method}, trained with {source.trained_with}")
    if cut := store.cut_line():
        referee.say(cut)
    alone, failed = len(data) == len(sources) == 1, []
    for dataset in data:
        errors: dict[str, list[str]] = {}  # the sources by what kept them: one reason is said once
        try:
            lost = evaluate_dataset(dataset, list(zip(sources, wanted, strict=True)), referee)
        except KeyboardInterrupt:
            raise Interrupted(f"interrupted; {len(store.rows())} rows are kept in {store.file}") from None
        for source, error in lost:
            if alone:
                raise error
            errors.setdefault(str(error), []).append(f"{source.name} on {dataset.source}")
        for message, names in errors.items():
            referee.say(f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} left out: {message}")
            failed += names
    if store.file.exists():
        referee.say(f"rows: {store.file}")
    if tracking and rank() == 0:
        track_rows(sources, store, tracking)
    if failed:
        rest = f", the other rows are in {store.file}" if store.file.exists() else ""
        raise Failure(f"could not be evaluated: {', '.join(failed)}; the reasons stand above{rest}")
    return store


def evaluate_dataset(dataset: Dataset, sources: Sequence[tuple[Source, Specs]], referee: Referee) -> list[tuple[Source, Exception]]:
    """All sources, each with its specs by protocol, on one dataset; those that failed, and why. Sources of one size share one pass."""
    failed: list[tuple[Source, Exception]] = []
    by_size: dict[int, list[tuple[Source, Specs]]] = {}
    for source, specs in sources:
        try:
            by_size.setdefault(size_on(dataset, source, referee), []).append((source, specs))
        except UsageError as error:
            failed.append((source, error))
    for size, group in by_size.items():
        try:
            images = Images.load(dataset, size, referee)
        except (UsageError, Failure) as error:
            failed += [(source, error) for source, _ in group]
            continue
        evaluations = [Evaluation(source, specs, images, referee) for source, specs in group]
        for number, split in enumerate((images.train, images.test)):
            for (place, spec), lost in read_all([evaluation.readings[number] for evaluation in evaluations], split.images).items():
                evaluations[place].lose(lost, ["features"], [spec])
        total = sum(evaluation.steps for evaluation in evaluations)
        with tqdm(total=total, leave=False, unit="run", disable=True if rank() else None) as bar:
            for evaluation in evaluations:
                try:
                    evaluation.run(bar)
                except (UsageError, Failure) as error:
                    failed.append((evaluation.source, error))
    return failed


def size_on(dataset: Dataset, source: Source, referee: Referee) -> int:
    """The side in pixels that the source reads the dataset's images at; UsageError where it cannot be the one that the dataset asks for."""
    size, backbone = source.image_size, source.backbone
    if backbone is not None and dataset.image_size not in (None, size):
        # weights that are not from here are brought to another size when they are loaded, by their authors' rule
        if source.recipe is None or size != backbone.image_size:
            raise UsageError(f"{dataset.source} asks for {dataset.image_size} px; use --image-size {dataset.image_size}")
        size = dataset.image_size or size
    if backbone is not None and size != backbone.image_size:
        referee.say(f"{source.name}: positions interpolated from {backbone.image_size} px to {size} px")
    return size


def wanted_specs(source: Source, rules: Sequence[Protocol], asked: Sequence[str] | None, trained: Sequence[str]) -> Specs:
    """The canonical specs that each protocol, by name, reads this source with.

    Protocols that train a readout take all, the learned ones too where nothing is asked: so each meets those without parameters in one
    training. Those that read features take the ones without parameters and the one that the source was trained with. UsageError for a
    spec that no protocol takes."""
    if source.backbone is None:  # raw pixels are a floor for k-NN only
        return {rule.name: source.readouts(asked) if rule.kind == "knn" else [] for rule in rules}
    specs = source.readouts(asked, trained)
    learnable = [spec for spec in specs if ReadoutSpec.parse(spec).learned]
    fixed = [spec for spec in specs if spec == source.trained_with or spec not in learnable]
    every = [*specs, *(available(source.backbone.cls_tokens, source.backbone.registers, learned=True) if asked is None else ())]
    taken = {rule.name: {"features": fixed, "tokens": list(dict.fromkeys(every)), "images": specs}[rule.reads] for rule in rules}
    for spec in specs if asked is not None else ():
        # what a checkpoint beside it was trained with, its start cannot be read with: it has that readout's parameters nowhere
        if not any(spec in of for of in taken.values()) and not (source.method == "random" and spec in learnable):
            why = "has parameters, which this source has not trained; add --protocols attentive, which trains them"
            raise UsageError(f"{source.name}: readout {spec!r} {why}, or leave it out")
    return taken


def open_store(out: str | Path) -> RowStore:
    """The store in `out`; UsageError if that is a file or a folder that holds something else."""
    folder = Path(out)
    known = ("rows.jsonl", "features", "predictions")  # the latter two alone: stopped before the first row
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not any((folder / name).exists() for name in known))):
        raise UsageError(f"{out} already holds something else; name another folder with --out")
    store = RowStore(folder)
    if not store.file.exists():  # else all may be there, and nothing is to be written
        check_writable(folder)
    return store
