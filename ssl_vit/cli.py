"""`ssl-vit COMMAND`: dispatch only. The one module that knows both packages; it imports the judging side where a command needs it."""

import argparse
import errno
import os
import sys
import warnings
from dataclasses import replace
from typing import Any, NoReturn

from ssl_vit.errors import Failure, Interrupted, UsageError, one_of

USAGE = """\
usage: ssl-vit COMMAND ...

  quickstart  [--out DIR]                       pretrain, evaluate and compare on embedded data; ends with a report
  pretrain    RECIPE [--trainer.devices 8 ...]  any Lightning Trainer flag, any recipe field; --dry-run tells the cost
  eval        SOURCE... [--data D...]           how well every readout of checkpoints and controls transfers
  compare     DIR... [--out DIR]                evaluated folders as one table and one report
  study       STUDY [--dry-run] [--launcher L]  pretrain x eval x compare over a grid of readouts and seeds; resumable
  export      CKPT --out DIR                    safetensors that timm.create_model loads

`ssl-vit COMMAND --help` tells more. Exit codes: 0, 2 for wrong usage, 1 for failures; --debug shows the traceback.
"""

PRETRAIN = """\
--dry-run tells parameters, operations, steps, memory and hours, and trains nothing
--online-knn DATA [--online-knn-every EPOCHS] watches the k-NN accuracy of the trained readout on labelled images
--wandb [ENTITY/]PROJECT logs the run to W&B; with --resume, also one that is finished
"""

DENIED = (errno.EROFS, errno.EACCES, errno.EPERM, errno.EBUSY)  # the last one: a folder that is a mount, which cannot be replaced
VERBOSE = "print all that the report says, not one screen of it"


class Parser(argparse.ArgumentParser):
    """argparse that refuses abbreviations and answers a wrong option with the nearest one, in one line."""

    def __init__(self, command: str, description: str, **options: Any) -> None:
        super().__init__(prog=f"ssl-vit {command}", description=description, allow_abbrev=False, **options)

    def parse(self, arguments: list[str]) -> argparse.Namespace:
        values, unknown = self.parse_known_args(arguments)
        if unknown:
            options = [option for action in self._actions for option in action.option_strings if option.startswith("--")]
            raise UsageError(f"unknown argument {unknown[0]!r}; {one_of(unknown[0].split('=')[0], options)}")
        return values

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def main() -> NoReturn:
    """The console script."""
    arguments = sys.argv[1:]
    sys.exit(run([argument for argument in arguments if argument != "--debug"], "--debug" in arguments))


def run(arguments: list[str], debug: bool = False) -> int:
    """Run one command; the exit code."""
    _quiet_the_libraries()
    try:
        dispatch(arguments)
        sys.stdout.flush()
        return 0
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        go_on = "go on with --resume" if arguments[:1] == ["pretrain"] else "the same command goes on"
        match error:
            case UsageError() | Failure():
                code, message = (2 if isinstance(error, UsageError) else 1), str(error)
            case Interrupted():
                code, message = 128 + error.number, f"{error}; {go_on}"
            case OSError() if error.errno in (errno.ENOSPC, errno.EDQUOT):
                file = error.filename or "a file"
                code, message = 1, f"disk full: {file} cannot be written, what was there is kept; make room, and {go_on}"
            case OSError() if error.errno in DENIED and error.filename:
                what = f"{error.filename} cannot be {'read or ' * (error.errno == errno.EACCES)}written ({error.strerror})"
                code, message = 1, f"{what}; what was there is kept; get the right to do so, or name another folder"
            case KeyboardInterrupt():
                code, message = 130, "interrupted"
            case SystemExit() if not isinstance(error.__context__, KeyboardInterrupt):  # argparse's --help, --print_config
                return int(error.code or 0)
            case SystemExit():  # Lightning's, of a Ctrl-C before the first step
                code, message = 130, "interrupted"
            case BrokenPipeError() if _stdout_is_closed():
                return 141  # as of a process that SIGPIPE ends
            case _:
                code, message = 1, f"{type(error).__name__}: {' '.join(str(error).split())}; --debug shows where"
        if debug and not isinstance(error, SystemExit):
            raise
        print(f"ssl-vit: {message}", file=sys.stderr)
        return code


def dispatch(arguments: list[str]) -> None:
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in ("-h", "--help"):
        print(USAGE, end="")
    elif command == "--version":
        import importlib.metadata

        print(importlib.metadata.version("ssl-vit"))
    elif command in COMMANDS:
        COMMANDS[command](rest)
    else:
        raise UsageError(f"unknown command {command!r}; {one_of(command, COMMANDS)}")


def pretrain(arguments: list[str]) -> None:
    from ssl_vit.assets import find_asset, list_assets

    names = ", ".join(list_assets("recipes"))
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: ssl-vit pretrain RECIPE [options]; RECIPE is a YAML file or one of: {names}")
        print("ssl-vit pretrain RECIPE --help lists the options, --print_config the resolved recipe")
        print(PRETRAIN, end="")
        if not arguments:
            raise UsageError(f"which recipe? give a YAML file or one of: {names}")
        return
    if arguments[0].startswith("-"):
        raise UsageError(f"the recipe comes first, got {arguments[0]!r}; give a YAML file or one of: {names}")
    find_asset("recipes", arguments[0])  # a wrong name is answered at once; the imports below take seconds
    parser = Parser("pretrain", "", add_help=False)  # the rest, --help among it, goes to the recipe's own
    parser.add_argument("--online-knn", metavar="D")
    parser.add_argument("--online-knn-every", type=int, default=10)
    parser.add_argument("--wandb", metavar="PROJECT")
    parser.add_argument("--dry-run", action="store_true")
    values, options = parser.parse_known_args(arguments[1:])
    if "--help" in options or "-h" in options:
        from ssl_vit.train.pretrain import likely_options

        print(f"{likely_options(arguments[0])}\noptions of the command:\n{PRETRAIN}\nall options of the recipe:\n")
    if values.dry_run:
        from ssl_vit.train.dry_run import dry_run

        return dry_run(arguments[0], options)
    callbacks = []
    if values.online_knn:  # it reads labels, so it belongs to the judging side, and nothing of the run depends on it
        from ssl_vit_eval.probes.online_knn import OnlineKNN

        callbacks.append(OnlineKNN(values.online_knn, every=values.online_knn_every))
    elif any(option.startswith("--online-knn-every") for option in arguments):
        raise UsageError("--online-knn-every needs --online-knn DATA")
    from ssl_vit.train.pretrain import pretrain as run_pretrain
    from ssl_vit.train.tracking import Tracking

    run_pretrain(arguments[0], options, callbacks, Tracking.parse(values.wandb) if values.wandb is not None else None)


def evaluate(arguments: list[str]) -> None:
    parser = Parser(
        "eval",
        "Read every source in every way on every dataset; rows and per-image predictions land in the output folder. "
        "What it prints as oracle is the best setting's accuracy on test, which is never used.",
    )
    files = "checkpoint (CKPT:student for a DINO run's student), exported folder, DINO / MAE / DINOv2 weights file"
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help=f"{files}, timm:NAME, random:RECIPE, pixels or pixels:SIZE")
    parser.add_argument("--data", nargs="+", metavar="D", help="hub id, local folder or builtin:NAME; default: builtin:photos")
    parser.add_argument("--suite", metavar="S", help="a list of data: a name or a YAML file")
    parser.add_argument("--protocols", nargs="+", default=["knn", "logreg"], metavar="P", help="names or YAML files (default: knn logreg)")
    parser.add_argument("--readouts", nargs="+", metavar="R", help="specs, or 'trained' (default: every single one that the source has)")
    parser.add_argument("--controls", nargs="+", default=[], metavar="C", help="shuffled (labels), width (A+B, half of other images)")
    parser.add_argument("--diagnostics", action="store_true", help="spectra, attention, norms and maps too, and accuracy by block")
    parser.add_argument("--image-size", type=int, metavar="PX", help="another side than the source's own; positions are interpolated")
    parser.add_argument("--out", default="runs/eval", metavar="DIR", help="default: runs/eval")
    parser.add_argument("--cache", metavar="DIR", help="where features are kept, to be read again; default: features in --out")
    for name in ("train-split", "test-split", "image-column", "label-column"):
        parser.add_argument(f"--{name}", metavar="NAME", help="found by itself where the dataset follows the usual names")
    parser.add_argument("--wandb", metavar="PROJECT", help="log every source there; [ENTITY/]PROJECT")
    parser.add_argument("--wandb-predictions", action="store_true", help="the answer to every image too, as an artefact")
    values = parser.parse(arguments)
    from ssl_vit.train.tracking import Tracking

    if values.wandb_predictions and values.wandb is None:
        raise UsageError("--wandb-predictions needs --wandb PROJECT")
    tracking = None if values.wandb is None else replace(Tracking.parse(values.wandb), predictions=values.wandb_predictions)
    from ssl_vit_eval.distributed import process_group, rank
    from ssl_vit_eval.evaluate import evaluate as run_evaluate
    from ssl_vit_eval.sources import open_source
    from ssl_vit_eval.suites import Dataset, load_suite

    names = values.data or ([] if values.suite else ["builtin:photos"])
    columns = (values.train_split, values.test_split, values.image_column, values.label_column)
    if any(columns) and not values.data:
        raise UsageError("split and column names go with --data; a suite has its own in its file")
    data = [*(Dataset(name, *columns) for name in names), *(load_suite(values.suite) if values.suite else ())]
    with process_group():
        sources, first = [open_source(name, values.image_size) for name in values.sources], dict[tuple[str, int], str]()
        for name, source in zip(values.sources, sources, strict=True):
            if (other := first.setdefault((source.weights, source.image_size), name)) != name and rank() == 0:
                print(f"{name}: same weights as {other}, so both have the same rows")
        options = (values.controls, values.cache, values.diagnostics)
        run_evaluate(sources, data, values.protocols, values.readouts, values.out, *options, tracking=tracking)


def compare(arguments: list[str]) -> None:
    parser = Parser("compare", "One table and one report from the rows found below the given folders.")
    parser.add_argument("folders", nargs="+", metavar="DIR", help="what eval or study wrote")
    parser.add_argument("--out", metavar="DIR", help="where report.html goes; default: the first folder")
    parser.add_argument("--margin", type=float, metavar="POINTS", help="differences below it do not matter; 1, or as the study declares it")
    parser.add_argument("--family", help="what Holm's correction runs over: study, all datasets and protocols, or setting, each alone")
    parser.add_argument("--wandb", metavar="PROJECT", help="write a W&B Report there as well; [ENTITY/]PROJECT")
    parser.add_argument("--wandb-group", metavar="NAME", help="on the runs of this study alone")
    parser.add_argument("--verbose", action="store_true", help=VERBOSE)
    values = parser.parse(arguments)
    if values.wandb_group is not None and values.wandb is None:
        raise UsageError("--wandb-group needs --wandb PROJECT")
    from ssl_vit_eval.report.terminal import compare as run_compare

    run_compare(values.folders, values.out, values.margin, values.wandb, values.wandb_group, values.verbose, values.family)


def study(arguments: list[str]) -> None:
    parser = Parser("study", "Pretrain, evaluate and compare every cell of a grid; finished cells are skipped.")
    parser.add_argument("study", metavar="STUDY", help="a YAML file or a name")
    parser.add_argument("--out", metavar="DIR", help="default: runs/STUDY")
    parser.add_argument("--dry-run", action="store_true", help="cells, steps, images, FLOPs and time; trains and writes nothing")
    parser.add_argument("--cell", metavar="NAME", help="pretrain and evaluate this cell alone, or 'controls'; for engines")
    engines = "one after another (local), as Slurm jobs (slurm), by agents of a W&B sweep (wandb)"
    parser.add_argument("--launcher", choices=("local", "slurm", "wandb"), default="local", metavar="L", help=engines)
    parser.add_argument("--wandb", metavar="PROJECT", help="log every cell there; [ENTITY/]PROJECT")
    parser.add_argument("--verbose", action="store_true", help=VERBOSE)
    values = parser.parse(arguments)
    if (values.launcher != "local") + values.dry_run + (values.cell is not None) > 1:
        raise UsageError("--dry-run, --cell and --launcher are different things to do with a study; choose one")
    from ssl_vit.train.tracking import Tracking

    tracking = Tracking.parse(values.wandb) if values.wandb else None
    if values.dry_run:
        from ssl_vit_eval.study.dry_run import dry_run

        dry_run(values.study, values.out)
    elif values.launcher != "local":
        from ssl_vit_eval.study.launchers import launch_slurm, launch_wandb

        (launch_slurm if values.launcher == "slurm" else launch_wandb)(values.study, values.out, tracking)
    else:
        from ssl_vit_eval.study.run import run_cell, run_study

        if values.cell is not None:
            run_cell(values.study, values.out, values.cell, tracking)
        else:
            run_study(values.study, values.out, tracking, values.verbose)


def export(arguments: list[str]) -> None:
    parser = Parser("export", 'One network as safetensors, for timm.create_model("local-dir:DIR", pretrained=True) and for eval.')
    parser.add_argument("checkpoint", metavar="CKPT", help="a checkpoint; CKPT:student for the student of a DINO run")
    parser.add_argument("--out", required=True, metavar="DIR", help="a folder that is new or empty")
    values = parser.parse(arguments)
    from ssl_vit.weights.export import export as run_export

    print(f"exported: {run_export(values.checkpoint, values.out)}")


def quickstart(arguments: list[str]) -> None:
    parser = Parser("quickstart", "The study `quickstart`: DINO and MAE, each under CLS, GAP and registers, in minutes on a CPU.")
    parser.add_argument("--out", metavar="DIR", help="default: runs/quickstart")
    parser.add_argument("--verbose", action="store_true", help=VERBOSE)
    values = parser.parse(arguments)
    from ssl_vit_eval.study.run import run_study

    run_study("quickstart", values.out, verbose=values.verbose)


COMMANDS = {"quickstart": quickstart, "pretrain": pretrain, "eval": evaluate, "compare": compare, "study": study, "export": export}


def _stdout_is_closed() -> bool:
    """Whether its reader is gone, as in `ssl-vit compare DIR | head -1`; then it leads nowhere, or Python would complain at its end."""
    try:
        print(flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _quiet_the_libraries() -> None:
    """What the libraries say about themselves is not for our users; what they warn of in our code is for our tests."""
    import logging

    chatter = ("GPU available", "TPU available", "HPU available", "💡", "`Trainer.fit` stopped", "Restor", "Using bfloat16", "Using 16bit")
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(lambda record: not record.getMessage().startswith(chatter))
    if "pytest" not in sys.modules:
        warnings.filterwarnings("ignore", module=r"(lightning|torch|jsonargparse)\.")
