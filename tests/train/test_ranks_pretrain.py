"""`ssl-vit pretrain` on several processes, started as torchrun and Slurm start them: the run of one process."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ssl_vit.cli import run
from ssl_vit.model.readout import READOUTS
from ssl_vit.train.pretrain import build_method, parse_recipe
from ssl_vit.weights.checkpoint import read_checkpoint
from tests.processes import Command, free_port
from tests.processes import ranks as torchrun

pytestmark = [pytest.mark.usefixtures("pictures_and_recipes"), pytest.mark.timeout(900)]

OPTIONS = ["--trainer.accelerator", "cpu", "--backbone.drop_path", "0.2"]
EXACT = ("--trainer.precision", "64-true")
SPECS = {"dino": [*READOUTS, "cls@last2", "gap/pre"], "mae": [*READOUTS, "gap/pre"]}
FOUR = ("cls", "ep_cls")


def started(commands: list[list[str]]) -> list[tuple[int, str]]:
    """Exit code and all that was said, of launchers that run at the same time."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    processes = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for command in commands
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def begin(count: int, out: str, *options: str) -> list[Command]:
    return torchrun(count, "pretrain", *options, "--out", out, *OPTIONS, "--trainer.devices", str(count), "--trainer.strategy", "ddp")


def several(count: int, out: str, *options: str) -> None:
    for process in begin(count, out, *options):
        assert process.wait() == 0, process.said


def alone(out: str, *options: str) -> None:
    assert run(["pretrain", *options, "--out", out, *OPTIONS]) == 0


def weights(folder: str) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = read_checkpoint(Path(folder) / "last.ckpt")["state_dict"]
    return state


def assert_the_same_run(one: str, other: str, recipe: str, *options: str) -> None:
    """The same weights up to the order of additions over the batch.

    A relative error of 1e-7 in a gradient stays one in the step of AdamW, but for the few elements whose gradient is near 0 against its own
    error: those move by up to a step at will. So all weights are taken together, against how far they went; another crop, mask or order
    on one rank gives a difference of the order of the movement itself. In float64 the same holds nine digits further down."""
    first, second = weights(one), weights(other)
    parser, config = parse_recipe(recipe, [*options, *OPTIONS])
    start = build_method(config, parser.instantiate(config)).state_dict()
    assert first.keys() == second.keys() == start.keys()
    difference, movement = (sum((state[key] - first[key]).square().sum().item() for key in first) for state in (second, start))
    assert movement > 1e-3
    assert difference < (1e-20 if EXACT[1] in options else 1e-5) * movement


def compare(ranks: int, recipe: str, *options: str) -> None:
    alone("one", recipe, *options)
    several(ranks, "several", recipe, *options)
    assert json.loads(Path("several/run.json").read_text())["devices"] == f"{ranks} x cpu"
    assert_the_same_run("one", "several", recipe, *options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "readout", "ranks"),
    [(method, spec, ranks) for method in SPECS for spec in SPECS[method] for ranks in ((2, 4) if spec in FOUR else (2,))],
)
def test_two_and_four_processes_train_what_one_trains(method: str, readout: str, ranks: int) -> None:
    compare(ranks, f"{method}.yaml", "--readout", readout)


STREAMED = ("--data.decode", "stream", "--data.workers")
PATHS = {"memory": ("--data.decode", "memory"), "stream, no worker": (*STREAMED, "0"), "stream, 2 workers": (*STREAMED, "2")}
FAST = [("dino", "stream, 2 workers", 1, 2), ("mae", "stream, no worker", 2, 2), ("dino", "memory", 2, 2)]
ALL = [(method, path, accumulate, 2) for method in SPECS for path in PATHS for accumulate in (1, 2)]
ALL += [(method, path, 1, 4) for method in SPECS for path in PATHS if path.startswith("stream")]


@pytest.mark.parametrize(
    ("method", "path", "accumulate", "ranks"), [pytest.param(*case, marks=[] if case in FAST else pytest.mark.slow) for case in ALL]
)
def test_processes_train_what_one_trains_by_every_data_path(method: str, path: str, accumulate: int, ranks: int) -> None:
    """In float64, where the order of additions is far below everything else."""
    options = (*PATHS[path], *EXACT)
    alone("one", f"{method}.yaml", *options)
    several(ranks, "several", f"{method}.yaml", *options, "--accumulate", str(accumulate))
    assert_the_same_run("one", "several", f"{method}.yaml", *options)


@pytest.mark.parametrize(
    ("method", "path", "ranks"),
    [
        ("mae", "stream, 2 workers", (2, 1)),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [("dino", "stream, 2 workers", (1, 2)), ("dino", "memory", (4, 2))]),
    ],
)
def test_a_run_whose_processes_are_killed_goes_on_with_other_devices(method: str, path: str, ranks: tuple[int, int]) -> None:
    options = (f"{method}.yaml", *PATHS[path], *EXACT, "--trainer.max_steps", "45", "--optim.lr", "1e-3")
    kept = ("--keep_every_epochs", "1")
    first = begin(ranks[0], "killed", *options, *kept)
    first[0].wait_for("killed/epoch-0002.ckpt")
    for process in first:
        process.send(signal.SIGKILL)
    for process in first:
        process.wait()
    assert 6 <= read_checkpoint("killed/last.ckpt")["global_step"] < 45
    assert not Path("killed/run.json").exists()
    several(ranks[1], "killed", *options, *kept, "--resume")
    assert json.loads(Path("killed/run.json").read_text())["steps"] == 45
    alone("one", *options)
    assert_the_same_run("one", "killed", *options)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dino", "mae"])
def test_four_processes_that_are_resumed_end_in_the_same_bits(method: str) -> None:
    """In float32, where the order in which four gradients are added shows."""
    options = (f"{method}.yaml", "--keep_every_epochs", "1")
    several(4, "whole", *options)
    for name, of in (("last.ckpt", "epoch-0001.ckpt"), ("recipe.yaml", "recipe.yaml")):
        Path("resumed").mkdir(exist_ok=True)
        shutil.copy(Path("whole", of), Path("resumed", name))
    several(4, "resumed", *options, "--resume")
    one, other = weights("whole"), weights("resumed")
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.slow
def test_torchrun_with_two_nodes() -> None:
    """Two launchers of one process each, as on two machines: one writes, the other does not."""
    launcher = f"-m torch.distributed.run --nnodes 2 --nproc-per-node 1 --master-addr 127.0.0.1 --master-port {free_port()}".split()
    options = ["mae.yaml", "--trainer.devices", "1", "--trainer.num_nodes", "2", "--trainer.strategy", "ddp"]
    ours = ["-m", "ssl_vit", "pretrain", *options, "--out", "several", *OPTIONS]
    done = started([[sys.executable, *launcher, "--node-rank", str(node), *ours] for node in range(2)])
    assert [code for code, _ in done] == [0, 0], done
    assert ["7 steps" in output for _, output in done] == [True, False]
    alone("one", "mae.yaml")
    assert_the_same_run("one", "several", "mae.yaml")


def slurm_tasks() -> list[dict[str, str]]:
    """The variables that srun sets for two tasks on one node; nothing else says how many processes there are, or which one this is."""
    job = {"SLURM_JOB_ID": "1234", "SLURM_JOB_NAME": "job", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1"}
    job |= {"SLURM_NODELIST": "127.0.0.1", "SLURM_JOB_NODELIST": "127.0.0.1", "SLURM_NODEID": "0", "MASTER_ADDR": "127.0.0.1"}
    return [{**job, "MASTER_PORT": port, "SLURM_PROCID": task, "SLURM_LOCALID": task} for port in [free_port()] for task in "01"]


def test_slurm() -> None:
    options = ("mae.yaml", "--out", "several", *OPTIONS, "--trainer.devices", "2", "--trainer.strategy", "ddp")
    tasks = [Command("pretrain", *options, **task) for task in slurm_tasks()]
    assert [task.wait() for task in tasks] == [0, 0], [task.said for task in tasks]
    assert ["7 steps" in task.said for task in tasks] == [True, False]
    assert json.loads(Path("several/run.json").read_text())["devices"] == "2 x cpu"
    steps = [json.loads(line)["step"] for line in Path("several/metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))  # each once
    alone("one", "mae.yaml")
    assert_the_same_run("one", "several", "mae.yaml")


def test_a_job_starts_from_no_other_run_s_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning loads the hpc_ckpt of any run that it finds in its folder under Slurm."""
    alone("other", "mae.yaml", "--seed", "1")
    shutil.copy("other/last.ckpt", "hpc_ckpt_1.ckpt")
    alone("before", "mae.yaml")
    for name, value in {**slurm_tasks()[0], "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1"}.items():
        monkeypatch.setenv(name, value)
    alone("job", "mae.yaml")
    one, other = weights("before"), weights("job")
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.slow
def test_a_run_folder_that_nodes_do_not_share_is_refused() -> None:
    alone("shared", "mae.yaml", "--keep_every_epochs", "1")
    for name, of in (("last.ckpt", "epoch-0001.ckpt"), ("recipe.yaml", "recipe.yaml")):
        Path("first").mkdir(exist_ok=True)
        shutil.copy(Path("shared", of), Path("first", name))
    options = ["mae.yaml", "--resume", "auto", "--keep_every_epochs", "1", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    folders = zip(("first", "second"), slurm_tasks(), strict=True)
    tasks = [Command("pretrain", *options, "--out", folder, *OPTIONS, **task) for folder, task in folders]
    assert [task.wait() for task in tasks] == [2, 2], [task.said for task in tasks]
    assert all("they must share it" in task.said and "Traceback" not in task.said for task in tasks)
