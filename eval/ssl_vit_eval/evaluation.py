"""One source on one dataset: what is missing of its rows, the features that it needs for them, and the protocols on these."""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import Bool, Int64
from torch import Tensor

from ssl_vit.errors import Failure, UsageError
from ssl_vit.model.readout import ReadoutSpec
from ssl_vit_eval.controls import BESIDE, SHUFFLED, controlled, controls_of, shuffled
from ssl_vit_eval.diagnostics.run import examine, half_precision, with_blocks
from ssl_vit_eval.distributed import agreed, gather_objects, in_memory, rank, world
from ssl_vit_eval.features.extract import Reading
from ssl_vit_eval.features.tokens import open_tokens
from ssl_vit_eval.memory import place_for
from ssl_vit_eval.metrics import METRICS
from ssl_vit_eval.probes.selection import Diverged, Found
from ssl_vit_eval.protocols import KINDS, Protocol
from ssl_vit_eval.results import make_rows, sentence
from ssl_vit_eval.rows import Key, RowStore
from ssl_vit_eval.sources import Source, on_device
from ssl_vit_eval.splits import Split
from ssl_vit_eval.suites import Dataset

Say = Callable[[str], None]
Specs = dict[str, list[str]]  # the readouts that each protocol reads, by its name


class Task(NamedTuple):
    """One run of a protocol: of one readout, or of several where that is faster."""

    rule: Protocol
    control: str
    specs: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.rule.name}{f' ({self.control})' if self.control else ''} of {', '.join(self.specs)}"


@dataclass(frozen=True)
class Referee:
    """What is asked of every source on every dataset. controls: of `controls.CONTROLS`; cache: the folder of the features."""

    rules: Sequence[Protocol]
    controls: Sequence[str]
    diagnostics: bool
    store: RowStore
    cache: Path
    tell: Say  # by every process

    def say(self, line: str) -> None:
        """By the first process alone."""
        if rank() == 0:
            self.tell(line)


@dataclass(frozen=True)
class Images:
    """Train and test of one dataset at one size, with labels; fingerprints of both, and what rows call the transform."""

    train: Split
    test: Split
    fingerprints: tuple[str, str]
    transform: str
    known: set[tuple[Key, str]]  # evaluations that are there, or planned by the sources so far: two may be the same network
    _slices: dict[Any, Bool[Tensor, " n"]] = field(default_factory=dict)

    @classmethod
    def load(cls, dataset: Dataset, size: int, referee: Referee) -> "Images":
        """Called by every process, as what follows; the first one computes the fingerprints, which are read off all images, and looks
        which evaluations there are."""
        prints, known = ("", ""), set[tuple[Key, str]]()
        with agreed():
            train, test = dataset.load(size)
            for notice in dict.fromkeys((*train.notices, *test.notices)):
                referee.say(notice)
            if rank() == 0:
                prints = (train.fingerprint, test.fingerprint)
                known = referee.store.known("".join(prints))
                if known and test.metric:
                    referee.store.declare("".join(prints), test.metric)
        return cls(train, test, gather_objects(prints)[0], dataset.transform(size), gather_objects(known)[0])

    @property
    def data(self) -> str:
        """The hash of both splits, as in the rows."""
        return "".join(self.fingerprints)

    def held_out(self, rule: Protocol, control: str) -> tuple[Int64[Tensor, " n"], Bool[Tensor, " n"] | Int64[Tensor, " n"]]:
        """The labels of train that a task meets, and its selection slice (or groups), drawn once for all sources."""
        y = shuffled(self.train.labels) if control == SHUFFLED else self.train.labels
        key = (control == SHUFFLED, *(rule.parameters.get(name) for name in ("slice_fraction", "slice_seed")))
        if key not in self._slices:
            self._slices[key] = rule.held_out(y, self.train.selection, self.train.groups)
        return y, self._slices[key]


class Evaluation:
    """One source on one dataset: what is missing, the features that it needs, and the protocols on them."""

    def __init__(self, source: Source, specs: Specs, images: Images, referee: Referee) -> None:
        """specs: by protocol."""
        self.source, self.images, self.referee = source, images, referee
        self.name = f"{source.name} on {images.train.dataset}"
        self.plain: list[str] = []  # what is diagnosed
        half: list[str] = []
        if referee.diagnostics and (backbone := source.backbone) is not None:
            self.plain = next((specs[rule.name] for rule in referee.rules if rule.reads == "features"), [])
            blocks = with_blocks(self.plain, backbone.depth)
            half = half_precision([spec for spec in blocks if spec not in self.plain])
            specs = {rule.name: blocks if rule.kind == "knn" and self.plain else specs[rule.name] for rule in referee.rules}
            if not self.plain:
                referee.say(f"{self.name}: diagnostics need a readout without parameters; none was asked for")
        tasks = [task for rule in referee.rules for task in self.missing(rule, specs[rule.name])]
        if not tasks:
            referee.say(f"{self.name}: done before")
        keys = (self.key(task.rule, spec, task.control) for task in tasks for spec in task.specs)
        images.known.update((key, metric) for key in keys for metric in METRICS)
        self.asked = sum(len(task.specs) for task in tasks) + bool(self.plain)  # runs
        refused, self.tasks = self.refused(tasks)
        self.failed = refused if rank() == 0 else []  # those that this process answers for
        pooled = self.specs("features")
        self.readings = [Reading.of(source, pooled, split, data, images.transform, referee.cache, half) for split, data in self.splits]

    @property
    def mine(self) -> list[Task]:
        """Tasks that all processes share, one after the other, then this process's own of the others."""
        shared = [task for task in self.tasks if KINDS[task.rule.kind].shared]
        return [*shared, *[task for task in self.tasks if task not in shared][rank() :: world()]]

    @property
    def steps(self) -> int:
        return len(self.mine) + bool(self.plain)

    def specs(self, *reads: str) -> list[str]:
        """The readouts of the tasks that read this."""
        return list(dict.fromkeys(spec for task in self.tasks if task.rule.reads in reads for spec in task.specs))

    def lose(self, error: Exception, reads: Collection[str], specs: Collection[str]) -> None:
        """What reads this of these readouts fails, the rest goes on. Called by every process."""
        tasks, self.tasks = self.tasks, []
        for task in tasks:
            left = tuple(spec for spec in task.specs if task.rule.reads not in reads or spec not in specs)
            self.failed += [error] * (len(task.specs) - len(left)) if rank() == 0 else []
            self.tasks += [task._replace(specs=left)] if left else []
        for reading in self.readings if "features" in reads else ():
            for spec in specs:
                reading.files.pop(spec, None)
        if "features" in reads and self.plain:
            self.plain = [spec for spec in self.plain if spec not in specs]
            self.failed += [] if self.plain or rank() else [error]

    @contextmanager
    def preparing(self, *reads: str) -> Iterator[None]:
        """Around what every process does for the tasks that read this: they fail with it on all processes, and they alone."""
        try:
            with agreed():
                yield
        except (UsageError, Failure) as error:
            self.lose(error, reads, self.specs(*reads))

    @property
    def splits(self) -> list[tuple[Split, str]]:
        return list(zip((self.images.train, self.images.test), self.images.fingerprints, strict=True))

    def missing(self, rule: Protocol, specs: Sequence[str]) -> list[Task]:
        places: dict[str, list[str]] = {}
        for spec in specs:
            for control in controls_of(self.referee.controls, spec, rule.kind != "knn") if rule.reads == "features" else [""]:
                if not all((self.key(rule, spec, control), metric) in self.images.known for metric in METRICS):
                    places.setdefault(control, []).append(spec)
        tasks = []
        for control, of in places.items():
            # a joint run is divided among the processes; features with columns of other images are a copy in memory: one at a time
            count = min(len(of), world() if KINDS[rule.kind].joint and not control.endswith(BESIDE) else len(of))
            tasks += [Task(rule, control, tuple(of[part::count])) for part in range(count)]
        return tasks

    def refused(self, tasks: Sequence[Task]) -> tuple[list[Exception], list[Task]]:
        """What cannot be done within the memory, said before anything is read, and the other tasks."""
        refusals: dict[int, Exception] = {}
        n, m = len(self.images.train.labels), len(self.images.test.labels)
        for number, task in enumerate(tasks):
            width, fit = max(map(self.source.width, task.specs)), KINDS[task.rule.kind].memory
            needed = fit(n, width) if fit else 0
            copied = 4 * (n + m) * width if task.control.endswith(BESIDE) else 0
            advice = "use the protocol linear, which reads features batch by batch" if fit else "leave the control of width out"
            try:
                if needed or copied:
                    place_for(needed, str(task), advice, held=copied)
            except Failure as error:
                refusals[number] = error
        for others in gather_objects(refusals):
            refusals |= others
        return list(refusals.values()), [task for number, task in enumerate(tasks) if number not in refusals]

    def key(self, rule: Protocol, spec: str, control: str) -> Key:
        images = self.images
        return Key(self.source.weights, images.data, images.transform, rule.name, rule.version, rule.hash, spec, control)

    def run(self, bar: Any) -> None:
        """Carry out the tasks; each process keeps its own results at once. Failure at the end for those that failed."""
        steps = self.steps
        with ExitStack() as stack:
            with self.preparing("features"):
                self.features = [reading.features() for reading in self.readings]
            with self.preparing("tokens", "images"):
                stack.enter_context(on_device([self.source] if self.specs("tokens", "images") else []))
            with self.preparing("tokens"):
                if asked := self.specs("tokens"):
                    blocks = tuple(sorted({block for spec in asked for block in ReadoutSpec.parse(spec).blocks}))
                    cache, transform = self.referee.cache, self.images.transform
                    self.tokens = [open_tokens(self.source, of.images, blocks, cache, f"{data}-{transform}") for of, data in self.splits]
            bar.update(steps - self.steps)
            for task in self.mine:
                bar.set_description(f"{self.source.name}: {task}")
                shared = KINDS[task.rule.kind].shared
                try:
                    with nullcontext() if shared and world() > 1 else in_memory():  # what they share, they agree about themselves
                        self.failed += self.carry_out(task)
                except (UsageError, Failure) as error:
                    self.failed += [] if shared and rank() else [error] * len(task.specs)
                bar.update()
            failed = [error for errors in gather_objects(self.failed) for error in errors]
            if self.plain:
                bar.set_description(f"{self.source.name}: diagnostics")
                try:
                    with agreed(), on_device([self.source] if rank() == 0 else []):
                        if rank() == 0:
                            images, store = self.images, self.referee.store
                            path = examine(self.source, images.test, images.data, images.transform, self.plain, store)
                            self.referee.say(f"diagnostics: {path}")
                except (UsageError, Failure) as error:
                    failed.append(error)
                bar.update()
        if failed:
            what = "" if len(failed) == self.asked else f"{len(failed)} of {self.asked} runs failed, the others are kept: "
            raise type(failed[0])(what + "; ".join(dict.fromkeys(map(str, failed))))

    def carry_out(self, task: Task) -> list[Exception]:
        """Run the protocol, and keep the rows of what it finds: the time of several readouts by the parameters that each trained. What
        went wrong with some of its readouts alone."""
        begun, images = time.perf_counter(), self.images
        rule, (y, held_out) = task.rule, images.held_out(task.rule, task.control)
        run = partial(KINDS[rule.kind].run, rule.parameters)
        found: dict[str, Found]
        lost: list[Exception] = []
        try:
            if rule.reads == "features":
                train, test = ({spec: controlled(features[spec], spec, task.control) for spec in task.specs} for features in self.features)
                found = run(train, y, test, images.test.labels, held_out)
            elif rule.reads == "tokens":
                found = run(task.specs, self.tokens[0], y, self.tokens[1], images.test.labels, held_out)
            else:
                found = run(self.source.backbone, task.specs, images.train.images, y, images.test.images, images.test.labels, held_out)
        except Diverged as error:
            found, lost = error.found, [UsageError(reason) for reason in error.reasons]
        seconds, work = time.perf_counter() - begun, {spec: of.parameters or 1 for spec, of in found.items()}
        if KINDS[rule.kind].shared and rank():
            return lost
        for spec in found:
            key, width, remarks = self.key(rule, spec, task.control), self.source.width(spec), found[spec].remarks
            share = seconds * work[spec] / sum(work.values())
            rows = make_rows(self.source, key, found[spec], images.train, images.test, width, share, [*rule.deviations, *remarks])
            self.referee.store.append(rows, found[spec].predictions, images.test.labels)
            self.referee.tell("  warning: ".join([sentence(rows), *remarks]))
        return lost
