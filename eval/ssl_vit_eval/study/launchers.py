"""Engines that others keep: the cells of a study as jobs of Slurm, by submitit, or as runs of a W&B sweep that agents take.

Each job is `ssl-vit study STUDY --out DIR --cell NAME` in a folder that all machines share.
"""

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import create_model

from ssl_vit.errors import Failure, UsageError
from ssl_vit.train.tracking import Tracking
from ssl_vit_eval.rows import RowStore
from ssl_vit_eval.schema import STRICT, checked
from ssl_vit_eval.study.plan import CONTROL_CELL, Plan
from ssl_vit_eval.study.run import open_plan, run_cell

if TYPE_CHECKING:
    from submitit.helpers import DelayedSubmission


@dataclass(frozen=True)
class SlurmJob:
    """What a Slurm job calls. Stopped by its time limit or for another user's job, it is put back into the queue and goes on."""

    study: str
    out: str
    cell: str
    tracking: Tracking | None

    def __call__(self) -> None:
        run_cell(self.study, self.out, self.cell, self.tracking)

    def checkpoint(self) -> "DelayedSubmission":
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def launch_slurm(study: str, out: str | None, tracking: Tracking | None = None) -> list[str]:
    """Submit a job for each unfinished cell, and one for the controls, as one array; their ids. Logs and pickles go to DIR/slurm.

    UsageError without submitit or Slurm, and for `slurm:` parameters that submitit does not take.
    """
    plan = open_plan(study, out)
    parameters = _parameters(plan)
    from submitit import AutoExecutor
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    executor = AutoExecutor(plan.folder / "slurm", cluster="slurm")
    executor.update_parameters(name=plan.name, **parameters)
    cells = _unfinished(plan)
    if not cells:
        print(f"nothing is left to submit. {_afterwards(study, plan)}")
        return []
    try:
        with executor.batch():
            jobs = [executor.submit(SlurmJob(study, str(plan.folder), cell, tracking)) for cell in cells]
    except (FailedJobError, FailedSubmissionError) as error:
        raise Failure(f"sbatch refused the jobs: {' '.join(str(error).split())}; correct slurm in {study}") from error
    for cell, job in zip(cells, jobs, strict=True):
        print(f"{job.job_id}  {cell}")
    print(f"submitted; logs are in {plan.folder / 'slurm'}. {_afterwards(study, plan)}")
    return [job.job_id for job in jobs]


def _parameters(plan: Plan) -> dict[str, Any]:
    """`slurm:` as submitit's names: its common ones as they are, Slurm's own with their prefix."""
    try:
        from submitit import AutoExecutor
        from submitit.slurm.slurm import SlurmExecutor
    except ImportError as error:
        raise UsageError('--launcher slurm needs submitit: pip install "ssl-vit[slurm]"') from error
    if missing := [command for command in ("sbatch", "srun") if shutil.which(command) is None]:
        raise UsageError(f"--launcher slurm needs {missing[0]}, which is not on the PATH; start it where Slurm is, or leave --launcher out")
    common, one_process = AutoExecutor._typed_parameters(), {"name", "job_name", "nodes", "tasks_per_node", "ntasks_per_node"}
    fields: dict[str, Any] = dict.fromkeys(SlurmExecutor._valid_parameters() - one_process, (Any, None))
    fields |= {name: (kind, None) for name, kind in common.items() if name not in one_process}
    given = {str(key).removeprefix("slurm_"): value for key, value in plan.study.slurm.items()}
    where = f"study {plan.name}: slurm (a job is one process)"
    checked(create_model("Slurm", __config__=STRICT, **fields), given, where)
    if not {"timeout_min", "time"} & given.keys():
        raise UsageError(f"{where} has no timeout_min, and jobs would be stopped after 5 minutes; give that of a cell")
    return {key if key in common else f"slurm_{key}": value for key, value in given.items()}


def launch_wandb(study: str, out: str | None, tracking: Tracking | None) -> str:
    """Create a W&B sweep whose runs are the unfinished cells and the controls; the line that starts an agent, on any machine that
    shares the folder. UsageError without a project or a W&B key, Failure where the server cannot be reached or refuses it."""
    if tracking is None:
        raise UsageError("--launcher wandb creates a sweep in a project: add --wandb [ENTITY/]PROJECT")
    import wandb

    mode = wandb.setup(settings=wandb.Settings(silent=True)).settings.mode
    if mode != "online":
        raise UsageError(f"W&B is set to {mode}, and a sweep lives on its server; unset WANDB_MODE, or use --launcher local or slurm")
    if not wandb.login(prompt=False, verify=False):
        raise UsageError("no W&B account: run `wandb login`, or set WANDB_API_KEY")
    plan = open_plan(study, out)
    command = ["ssl-vit", "study", study, "--out", str(plan.folder), "--wandb", tracking.path]
    sweep = {
        "name": plan.name,
        "method": "grid",
        "program": command[0],
        "command": ["${env}", *command, "${args}"],
        "parameters": {"cell": {"values": _unfinished(plan)}},
    }
    try:
        name = wandb.sweep(sweep, entity=tracking.entity, project=tracking.project)
    except wandb.errors.UsageError as error:
        raise UsageError(f"W&B: {' '.join(str(error).split())}") from error
    except (wandb.errors.Error, OSError, ValueError) as error:
        raise Failure(f"W&B made no sweep: {' '.join(str(error).split())}; try again, or use --launcher local or slurm") from error
    line = f"wandb agent {tracking.path}/{name}"
    print(f"{line}    # in this folder, on every machine that is to help. {_afterwards(study, plan)}")
    return line


def _unfinished(plan: Plan) -> list[str]:
    """Cells without a run.json or any row, and the controls without one; a last evaluation that was cut is left to the final command."""
    rows = RowStore(plan.folder / "eval").rows()
    evaluated = {row.source for row in rows}
    cells = [cell.folder.name for cell in plan.cells if cell.summary is None or cell.folder.name not in evaluated]
    return cells if any(row.method == "random" for row in rows) else [*cells, CONTROL_CELL]


def _afterwards(study: str, plan: Plan) -> str:
    return f"When they are done, `ssl-vit study {study} --out {plan.folder}` does what is missing, compares and writes the report"
