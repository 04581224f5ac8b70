"""What lies in a run folder: whole checkpoints, the last two of them; and whether a run may begin there or go on."""

import os
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_info

from ssl_vit.assets import read_yaml
from ssl_vit.errors import Failure, OtherVersion, UsageError, reason
from ssl_vit.files import write_atomically
from ssl_vit.weights.checkpoint import read_checkpoint

LAST, PREVIOUS, LOCK = "last.ckpt", "previous.ckpt", ".lock"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, syncs, then renames: the name always holds a whole checkpoint, the old one or the new. The old
    `last.ckpt` stays as `previous.ckpt`."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        def write(file: BinaryIO) -> None:
            torch.save(checkpoint, file)
            if Path(path).name == LAST and Path(path).exists():
                keep(Path(path))

        write_atomically(Path(path), write)


def keep(last: Path) -> None:
    """As `previous.ckpt`: by a second name for the file, so that the first one is never missing."""
    partial = last.with_name(f".{PREVIOUS}.partial")
    try:
        partial.unlink(missing_ok=True)
        os.link(last, partial)
        os.replace(partial, last.with_name(PREVIOUS))
    except OSError:  # not every file system has second names
        os.replace(last, last.with_name(PREVIOUS))


def check_folder(folder: Path, resume: bool | str, others: bool = True) -> None:
    """UsageError if the run would overwrite something, or if there is nothing to resume. others: what is no run is in the way too."""
    begun = any((folder / name).exists() for name in (LAST, PREVIOUS, "recipe.yaml"))
    if resume is True and not begun:
        raise UsageError(f"nothing to resume: there is no run in {folder}; leave --resume out to start")
    # W&B's files, the lock and half-written ones alone: killed before the first step
    passing = (path.name in ("wandb", LOCK) or path.suffix == ".partial" for path in (folder.iterdir() if folder.is_dir() else ()))
    free = not folder.exists() or (folder.is_dir() and all(passing)) or not (begun or others)
    if (not resume or not begun) and not free:
        what, advice = ("a run", "add --resume to go on with it, or ") if begun else ("something else", "")
        raise UsageError(f"{folder} already holds {what}; {advice}name another folder with --out")


def checkpoints(folder: Path) -> list[Path]:
    """Those that a run can go on from, the newest first."""
    kept = sorted(folder.glob("epoch-*.ckpt"), key=lambda path: (len(path.name), path.name), reverse=True)  # 10000 is newer than 9999
    return [path for path in (folder / LAST, folder / PREVIOUS, *kept) if path.exists()]


def is_finished(folder: Path) -> bool:
    """Whether nothing is left to do. Of several processes the first one prepares the folder, and nobody waits for it here: the answer is
    the same before that, meanwhile and after it, and so is whether there are `checkpoints`."""
    record = folder / "run.json"
    if not record.exists() or not checkpoints(folder):
        return record.exists()
    try:
        read_checkpoint(folder / LAST)
    except (Failure, UsageError):  # will be repaired, or is missing: steps are to be done again
        return False
    return record.exists()  # who repairs takes it away first


def prepare_folder(folder: Path, recipe: dict[str, Any]) -> None:
    """Clear away what a kill has left, and see to it that `last.ckpt`, if there is any checkpoint, is the newest that can be read.

    One that is damaged stays as `last.ckpt.damaged`. UsageError if another recipe was trained here, Failure if no checkpoint can be read
    or another version wrote it."""
    for partial in folder.glob(".*.partial"):
        partial.unlink()
    last, damaged = folder / LAST, list[Failure]()
    # a run that was killed before its first checkpoint has only its recipe, and starts again
    before = read_yaml(folder / "recipe.yaml") if (folder / "recipe.yaml").exists() else recipe
    for path in checkpoints(folder):
        try:
            content = read_checkpoint(path)
        except OtherVersion:
            raise
        except Failure as error:
            damaged.append(error)
            continue
        before = content["ssl_vit"]["recipe"]
        if path != last:
            (folder / "run.json").unlink(missing_ok=True)  # the steps behind it are to be done again; `is_finished` wants it to go first
            what = "is missing"
            if last.exists():
                os.replace(last, last.with_name(f"{LAST}.damaged"))
                what = f"cannot be read ({reason(damaged[0].__cause__ or damaged[0])}) and is now {LAST}.damaged"
            rank_zero_info(f"{last} {what}: going on from {path} of step {content['global_step']}")
            write_atomically(last, lambda file, path=path: file.write(path.read_bytes()))  # type: ignore[misc]
        break
    else:
        if damaged:
            raise damaged[0]
    if changed := recipe_changes(before, recipe):
        raise UsageError(f"cannot resume {folder} with another recipe ({changed}); use the same one, or another --out")


def recipe_changes(before: dict[str, Any], after: dict[str, Any]) -> str:
    """`"optim.lr 0.1 -> 0.2, ..."`, empty if the recipes are the same."""
    old, new = flatten(before), flatten(after)
    changed = [f"{key} {old.get(key)!r} -> {new.get(key)!r}" for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    return ", ".join(changed[:4])


def flatten(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{a: {b: 1}}` -> `{"a.b": 1}`. What hangs below `trainer.NAME` belongs to Lightning."""
    flat: dict[str, Any] = {}
    for key, value in fields.items():
        nested = isinstance(value, dict) and value and not prefix.startswith("trainer.")
        flat |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat
