"""Weights & Biases: a run of its own for every pretraining and for every evaluated source, at no risk for either.

A pretraining (job_type `pretrain`) mirrors its run folder:

    config   the resolved recipe (`readout`, `seed`, `method`, `backbone.width`, ...), `source` (the folder's name), `recipe_hash`,
             `git`, `versions`
    history  the lines of `metrics.jsonl` over `trainer/global_step`, each step once, however often the run was killed and resumed
    summary  `checkpoint` (hash of the weights), `init` (hash of the weights that it started from), and of `run.json` `steps`,
             `images`, `flops`, `parameters`, `seconds`, `devices`

An evaluation (job_type `eval`) is described in `ssl_vit_eval.tracking`; its config's `checkpoint` equals the pretraining's.
"""

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, Any

from ssl_vit.errors import UsageError, reason
from ssl_vit.files import write_atomically

if TYPE_CHECKING:
    import wandb

STEP = "trainer/global_step"
INIT_SECONDS, FINISH_SECONDS = 15.0, 25.0  # W&B itself waits 90 s and for ever; where nobody answers, its exit takes 25 s more


@dataclass(frozen=True)
class Tracking:
    """Where runs are logged, and what marks them. entity None: the user's own; predictions: those of each image too."""

    project: str
    entity: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()
    predictions: bool = False

    @classmethod
    def parse(cls, text: str) -> "Tracking":
        """Of `PROJECT` or `ENTITY/PROJECT`; UsageError for anything else."""
        entity, slash, project = text.rpartition("/")
        if not all(re.fullmatch(r"[\w.-]{1,128}", name) for name in ((entity, project) if slash else (project,))):
            raise UsageError(f"--wandb {text!r} is not a W&B project; give PROJECT or ENTITY/PROJECT, of letters, digits, '-', '_' and '.'")
        return cls(project, entity or None)

    @property
    def path(self) -> str:
        return f"{self.entity}/{self.project}" if self.entity else self.project


class TrackedRun:
    """One W&B run about something in a folder, which is the same run whenever that is logged again to the same project.

    What goes wrong with W&B is said in one line and raises nothing. Where it is not reached, the run lies offline in `FOLDER/wandb`.
    part: what of the folder the run is about, where there are several such things.
    """

    def __init__(self, tracking: Tracking, folder: Path, job_type: str, part: str = "") -> None:
        self.tracking, self.folder, self.job_type = tracking, folder, job_type
        self.file = folder / "wandb" / (".".join(filter(None, (tracking.entity, tracking.project, part))) + ".json")
        self.state: dict[str, Any] = {"id": token_hex(8), "sent": "", "step": 0}
        if self.file.exists():
            self.state = json.loads(self.file.read_text())
        self.run: wandb.Run | None = None
        self.step = 0  # the last one that W&B has, or will have once the offline runs are synced

    @property
    def sent(self) -> str:
        """What `finish` was last told to have been logged."""
        return str(self.state["sent"])

    def start(self, name: str, config: dict[str, Any], offline: bool = False) -> None:
        with self._harmless("starting"):
            self.run = self._init(name, config, offline)
            if self.run is None:
                return
            self._write(sent="")
            self.run.define_metric(STEP)
            self.run.define_metric("*", step_metric=STEP)
            # not the summary, which may be a line ahead of the history that the server has
            known = self.state["step"] if self.run.offline else self.run.starting_step - 1
            self.step = max(known, *(last_step(folder) for folder in self._offline_folders()), 0)

    @property
    def started(self) -> bool:
        return self.run is not None

    @property
    def offline(self) -> bool:
        return self.run is not None and self.run.offline

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        """Add a line to the history; one of a step that is there already is left out: a resumed training repeats it exactly."""
        if self.run is None or (step is not None and step <= self.step):
            return
        with self._harmless("logging"):
            self.run.log(values if step is None else {**values, STEP: step}, step=step, commit=True)
            if step is not None:
                self.step = step
                if not self.run.offline:
                    self._write(step=step)  # an offline run's steps are read off its file

    def summarise(self, values: dict[str, Any]) -> None:
        if self.run is not None:
            with self._harmless("logging"):
                self.run.summary.update(values)

    def log_files(self, name: str, kind: str, files: Sequence[Path]) -> None:
        """An artefact of these files."""
        if self.run is None:
            return
        with self._harmless("logging"):
            import wandb

            artifact = wandb.Artifact(name, type=kind)
            for file in files:
                artifact.add_file(str(file))
            self.run.log_artifact(artifact)

    def finish(self, sent: str = "", failed: bool = False) -> None:
        """Wait a while for the last of it. sent: what is complete with this, to be found in `sent` the next time."""
        if self.run is None:
            return
        run, self.run = self.run, None
        try:
            run.finish(exit_code=int(failed))
            self._write(sent=sent)
        except Exception as error:  # TimeoutError where the server is gone, and whatever else W&B comes up with
            say(f"not all of {self.folder} has arrived ({reason(error)}); the same command, with --resume for pretrain, sends the rest")

    def _init(self, name: str, config: dict[str, Any], offline: bool) -> "wandb.Run | None":
        import wandb

        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # W&B's own telemetry, which complains where nobody answers
        # silent: what is to be said we say, and above all nobody is asked for a key
        mode = wandb.setup(settings=wandb.Settings(silent=True)).settings.mode
        why = "WANDB_MODE"
        # beside a run of the user's own, `login` answers nothing
        known = not wandb.run.offline if wandb.run else mode != "online" or wandb.login(prompt=False, verify=False)
        if offline or not known:
            offline, why = True, "not reached" if offline else "no account; run `wandb login`, or set WANDB_API_KEY"
        settings = wandb.Settings(
            silent=True,
            console="off",
            reinit="create_new",  # a run of the user's own in this process goes on
            allow_val_change=True,  # a resumed run may come from another revision
            init_timeout=float(os.environ.get("WANDB_INIT_TIMEOUT", INIT_SECONDS)),
            finish_timeout=float(os.environ.get("WANDB_FINISH_TIMEOUT", FINISH_SECONDS)),
            finish_timeout_raises=True,
        )
        arguments: dict[str, Any] = {
            "entity": self.tracking.entity,
            "project": self.tracking.project,
            "group": self.tracking.group,
            "tags": list(self.tracking.tags),
            "id": self.state["id"],
            "dir": self.folder,
            "name": name,
            "job_type": self.job_type,
            "config": config,
            "resume": "allow",
            "settings": settings,
        }
        try:
            run = wandb.init(mode="offline" if offline else None, **arguments)
        except wandb.errors.CommError as error:
            wandb.teardown()  # it holds on to the run's id
            wandb.setup(settings=wandb.Settings(silent=True))
            why = reason(error)
            run = wandb.init(mode="offline", **arguments)
        if run.disabled:
            run.finish()
            return None
        say(f"offline ({why}); to upload: wandb sync {self.folder}/wandb/offline-run-*-{run.id}" if run.offline else f"{run.url}")
        return run

    def _offline_folders(self) -> list[Path]:
        assert self.run is not None
        here = Path(self.run.settings.sync_dir).resolve()
        return [path for path in self.folder.glob(f"wandb/offline-run-*-{self.state['id']}") if path.resolve() != here]

    def _write(self, **changes: Any) -> None:
        self.state |= changes
        write_atomically(self.file, json.dumps(self.state))

    @contextmanager
    def _harmless(self, doing: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of any kind: the numbers are in the folder, and W&B is a mirror of them
            self.run = None
            say(f"{doing} {self.folder} failed, and goes on without W&B: {reason(error)}")


def last_step(folder: Path) -> int:
    """The last step in an offline run. A kill loses what was not yet written to its file: only the file knows."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json", str(folder)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(json.loads(shown)["summary"].get(STEP, 0))


def say(line: str) -> None:
    print(f"W&B: {line}", file=sys.stderr, flush=True)
