"""`ssl-vit eval`: sources x datasets x readouts x protocols x controls, into rows. What is there already is skipped."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from ssl_vit.errors import Failure, UsageError
from ssl_vit.model.readout import ReadoutSpec, available
from ssl_vit.train.tracking import Tracking
from ssl_vit_eval.controls import PROJECTED, SHUFFLED, check_controls, controls_of, projected, shuffled
from ssl_vit_eval.diagnostics.run import examine, with_blocks
from ssl_vit_eval.distributed import agreed, gather_objects, rank, world
from ssl_vit_eval.features.extract import cached_features
from ssl_vit_eval.features.tokens import TokenReader, open_tokens
from ssl_vit_eval.probes.selection import Found
from ssl_vit_eval.protocols import KINDS, Protocol, load_protocols
from ssl_vit_eval.results import METRICS, make_rows, sentence
from ssl_vit_eval.rows import Key, RowStore
from ssl_vit_eval.sources import Source
from ssl_vit_eval.splits import Split
from ssl_vit_eval.suites import Dataset
from ssl_vit_eval.tracking import track_rows

Say = Callable[[str], None]
Result = tuple[dict[str, Found], float] | UsageError | Failure | None  # of a job; None of a process that has none


class Job(NamedTuple):
    """One run of a protocol: of one readout, or of several where that is faster."""

    rule: Protocol
    control: str
    specs: tuple[str, ...]


@dataclass(frozen=True)
class Referee:
    """What is asked of every source on every dataset. controls: of `controls.CONTROLS`; cache: the folder of the features."""

    rules: Sequence[Protocol]
    controls: Sequence[str]
    diagnostics: bool
    store: RowStore
    cache: Path
    say: Say


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
    if diagnostics and not any(rule.kind == "knn" for rule in rules):
        raise UsageError("--diagnostics reads every block by k-NN; add a protocol of that kind, e.g. knn")
    if all(source.backbone is None for source in sources) and not any(rule.kind == "knn" for rule in rules):
        raise UsageError(f"raw pixels are a floor for k-NN only, got {', '.join(protocols)}; choose the protocol knn or add a source")
    for dataset in data:
        dataset.check()
    trained = [source.trained_with for source in sources if source.trained_with]
    wanted = [wanted_specs(source, rules, readouts, trained) for source in sources]
    say = say if rank() == 0 else lambda line: None
    store = open_store(out)
    referee = Referee(rules, controls, diagnostics, store, Path(cache) if cache else store.folder / "features", say)
    for source in sources:
        if source.backbone is not None and source.trained_with:
            say(f"{source.name}: {source.method}, trained with {source.trained_with}")
    failed = []
    for dataset in data:
        splits: dict[int, tuple[Split, Split]] = {}  # by image size: sources of one size share the decoded pictures
        for source, specs in zip(sources, wanted, strict=True):
            try:
                evaluate_source(source, specs, dataset, splits, referee)
            except (UsageError, Failure) as error:
                if len(data) == len(sources) == 1:
                    raise
                failed.append(f"{source.name} on {dataset.source}")
                say(f"{failed[-1]} is left out: {error}")
    say(f"rows: {store.file}")
    if tracking and rank() == 0:
        track_rows(sources, store, tracking)
    if failed:
        raise Failure(f"could not be evaluated: {', '.join(failed)}; the reasons stand above, the other rows are in {store.file}")
    return store


def wanted_specs(source: Source, rules: Sequence[Protocol], asked: Sequence[str] | None, trained: Sequence[str]) -> dict[str, list[str]]:
    """The canonical specs that each protocol, by name, reads this source with.

    Protocols that train a readout take the learned ones, those that read features the ones without parameters and the one that the
    source was trained with. UsageError for a spec that no protocol takes."""
    if source.backbone is None:  # raw pixels are a floor for k-NN only
        return {rule.name: source.readouts(asked) if rule.kind == "knn" else [] for rule in rules}
    specs = source.readouts(asked, trained)
    learnable = [spec for spec in specs if ReadoutSpec.parse(spec).learned]
    fixed = [spec for spec in specs if spec == source.trained_with or spec not in learnable]
    if asked is None:
        learnable = available(source.backbone.cls_tokens, source.backbone.registers, learned=True)
    taken = {rule.name: {"features": fixed, "tokens": learnable, "images": specs}[rule.reads] for rule in rules}
    for spec in specs if asked is not None else ():
        # what a checkpoint beside it was trained with, its start cannot be read with: it has that readout's parameters nowhere
        if not any(spec in of for of in taken.values()) and not (source.method == "random" and spec in learnable):
            kind = "has parameters, which this source has not trained" if spec in learnable else "has no parameters to train"
            other = "attentive, which trains them" if spec in learnable else "knn or logreg"
            raise UsageError(f"{source.name}: readout {spec!r} {kind}; add --protocols {other}, or leave it out")
    return taken


def evaluate_source(
    source: Source, specs: dict[str, list[str]], dataset: Dataset, splits: dict[int, tuple[Split, Split]], referee: Referee
) -> None:
    """One source on one dataset; `splits` keeps what was loaded for the next source."""
    size, backbone = source.image_size, source.backbone
    if backbone is not None and dataset.image_size not in (None, size):
        # weights that are not from here are brought to another size when they are loaded, by their authors' rule
        if source.recipe is None or size != backbone.image_size:
            raise UsageError(f"{dataset.source} asks for {dataset.image_size} px; use --image-size {dataset.image_size}")
        size = dataset.image_size or size
    if backbone is not None and size != backbone.image_size:
        referee.say(f"{source.name}: positions interpolated from {backbone.image_size} px to {size} px")
    if size not in splits:
        with agreed():
            splits[size] = dataset.load(size)
        for notice in dict.fromkeys(notice for split in splits[size] for notice in split.notices):
            referee.say(notice)
    Evaluation(source, *splits[size], dataset.transform(size), referee).run(specs)


class Evaluation:
    """One source on one dataset: one pass over each split for all readouts that are missing somewhere, then the protocols."""

    def __init__(self, source: Source, train: Split, test: Split, transform: str, referee: Referee) -> None:
        assert train.labels is not None
        assert test.labels is not None
        self.source, self.train, self.test, self.transform, self.referee = source, train, test, transform, referee
        self.y_train, self.y_test = train.labels, test.labels
        self.name = f"{source.name} on {train.dataset}"
        self.prints = ("", "")
        with agreed():
            if rank() == 0:  # read off all pictures: once, not by every process
                self.prints = (train.fingerprint, test.fingerprint)
        self.prints = gather_objects(self.prints)[0]

    def run(self, specs: dict[str, list[str]]) -> None:
        backbone, plain = self.source.backbone, next((specs[rule.name] for rule in self.referee.rules if rule.reads == "features"), [])
        if not self.referee.diagnostics or backbone is None or not plain:
            if self.referee.diagnostics and backbone is not None:
                self.referee.say(f"{self.name}: diagnostics need a readout without parameters; none was asked for")
            return self.judge(specs)
        blocks = with_blocks(plain, backbone.depth)
        self.judge({rule.name: blocks if rule.kind == "knn" else specs[rule.name] for rule in self.referee.rules})
        if rank() == 0:
            self.referee.say(
                f"diagnostics: {examine(self.source, self.test, ''.join(self.prints), self.transform, plain, self.referee.store)}"
            )

    def judge(self, specs: dict[str, list[str]]) -> None:
        """Carry out what is missing; specs by protocol."""
        known = gather_objects(self.referee.store.known() if rank() == 0 else set())[0]
        jobs = [job for rule in self.referee.rules for job in self.missing(rule, specs[rule.name], known)]
        if not jobs:
            self.referee.say(f"{self.name}: done before")
            return
        pooled = list(dict.fromkeys(spec for job in jobs if job.rule.reads == "features" for spec in job.specs))
        splits = tuple(zip((self.train, self.test), self.prints, strict=True))
        self.features = [self.extract(split, fingerprint, pooled) for split, fingerprint in splits]
        asked = [spec for job in jobs if job.rule.reads == "tokens" for spec in job.specs]
        if asked:
            blocks = tuple(sorted({block for spec in asked for block in ReadoutSpec.parse(spec).blocks}))
            self.tokens = [self.read_tokens(split, fingerprint, blocks) for split, fingerprint in splits]
        # jobs that all processes share, one after the other, then the others, one for each process at a time; what is done is kept at once
        shared = [job for job in jobs if KINDS[job.rule.kind].shared]
        own = [job for job in jobs if job not in shared]
        failed = [error for job in shared if (error := self.keep(job, self.carry_out(job)))]
        for start in range(0, len(own), world()):
            together = own[start : start + world()]
            mine = self.carry_out(together[rank()]) if rank() < len(together) else None
            results = gather_objects(mine)
            failed += [error for job, result in zip(together, results, strict=False) if (error := self.keep(job, result))]
        if failed:
            what = "" if len(failed) == len(jobs) else f"{len(failed)} of {len(jobs)} runs failed, the others are kept: "
            raise type(failed[0])(what + "; ".join(dict.fromkeys(map(str, failed))))

    def missing(self, rule: Protocol, specs: Sequence[str], known: set[tuple[Key, str]]) -> list[Job]:
        places: dict[str, list[str]] = {}
        for spec in specs:
            width = self.source.width(spec)
            token = width if self.source.backbone is None else self.source.backbone.width
            for control in controls_of(self.referee.controls, width, token) if rule.reads == "features" else [""]:
                if not all((self.key(rule, spec, control), metric) in known for metric in METRICS):
                    places.setdefault(control, []).append(spec)
        joint = KINDS[rule.kind].joint
        return [
            Job(rule, control, group) for control, of in places.items() for group in ([tuple(of)] if joint else [(spec,) for spec in of])
        ]

    def key(self, rule: Protocol, spec: str, control: str) -> Key:
        return Key(self.source.weights, "".join(self.prints), self.transform, rule.name, rule.version, rule.hash, spec, control)

    def extract(self, split: Split, fingerprint: str, specs: Sequence[str]) -> Mapping[str, Float[Tensor, "n _"]]:
        cache, title = self.referee.cache, f"{self.source.name}: {split.dataset} {split.split}"
        return cached_features(self.source, split.images, specs, cache, fingerprint, split.split, self.transform, title)

    def read_tokens(self, split: Split, fingerprint: str, blocks: tuple[int, ...]) -> TokenReader:
        key = f"{fingerprint}-{self.transform}"
        return open_tokens(self.source, split.images, blocks, self.referee.cache, key)

    def carry_out(self, job: Job) -> Result:
        """What the protocol finds for each readout, and the seconds that it took for one; or why it could not."""
        begun = time.perf_counter()
        rule, y = job.rule, shuffled(self.y_train) if job.control == SHUFFLED else self.y_train
        held_out = rule.held_out(y, self.train.selection)
        run = partial(KINDS[rule.kind].run, rule.parameters)
        try:
            if rule.reads == "features":
                train, test = ({spec: self.controlled(features[spec], job.control) for spec in job.specs} for features in self.features)
                found = run(train, y, test, self.y_test, held_out)
            elif rule.reads == "tokens":
                found = run(job.specs, self.tokens[0], y, self.tokens[1], self.y_test, held_out)
            else:
                found = run(self.source.backbone, job.specs, self.train.images, y, self.test.images, self.y_test, held_out)
        except (UsageError, Failure) as error:
            return error
        return found, (time.perf_counter() - begun) / len(job.specs)

    def controlled(self, X: Float[Tensor, "n d"], control: str) -> Float[Tensor, "n _"]:
        return projected(X, self.source.backbone.width) if self.source.backbone and control.startswith(PROJECTED) else X

    def keep(self, job: Job, result: Result) -> Exception | None:
        """Rows of what was found, by the first process; the error of a run that failed."""
        if isinstance(result, UsageError | Failure):
            return result
        assert result is not None
        found, seconds = result
        for spec in job.specs if rank() == 0 else ():
            source, key = self.source, self.key(job.rule, spec, job.control)
            width = source.backbone.width if source.backbone and job.control.startswith(PROJECTED) else source.width(spec)
            rows = make_rows(source, key, found[spec], self.train, self.test, width, seconds, job.rule.deviations)
            self.referee.store.append(rows, found[spec].predictions, self.y_test)
            self.referee.say(sentence(rows[0]))
        return None


def open_store(out: str | Path) -> RowStore:
    """The store in `out`; UsageError if that is a file or a folder that holds something else."""
    folder = Path(out)
    known = ("rows.jsonl", "features", "predictions")  # the latter two alone: stopped before the first row
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not any((folder / name).exists() for name in known))):
        raise UsageError(f"{out} already holds something else; name another folder with --out")
    return RowStore(folder)
