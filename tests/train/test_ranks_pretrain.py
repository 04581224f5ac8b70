"""`ssl-vit pretrain` on several processes, started as torchrun, Slurm and Lightning start them: the run of one process."""

import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch.utilities import rank_zero_only

from ssl_vit.cli import run
from ssl_vit.train.pretrain import build_method, parse_recipe
from ssl_vit.weights.checkpoint import read_checkpoint

pytestmark = [pytest.mark.usefixtures("pictures_and_recipes"), pytest.mark.timeout(900)]

OPTIONS = ["--trainer.accelerator", "cpu", "--backbone.drop_path", "0.2"]
EXACT = ("--trainer.precision", "64-true")
READOUTS = {"dino": ["cls", "gap", "register", "ep_cls", "cls@last2", "gap/pre"], "mae": ["cls", "gap", "register", "ep_cls", "gap/pre"]}


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def started(commands: list[list[str]], variables: list[dict[str, str]]) -> list[tuple[int, str]]:
    """Exit code and all that was said, of processes that run at the same time."""
    base = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    processes = [
        subprocess.Popen(command, env={**base, **own}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for command, own in zip(commands, variables, strict=True)
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def command(out: str, *options: str) -> list[str]:
    return ["-m", "ssl_vit", "pretrain", *options, "--out", out, *OPTIONS]


class Ranks:
    """The processes of one node with what torchrun sets for them, started as forks of one that has done the imports."""

    def __init__(self, ranks: int, out: str, *options: str) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["ssl_vit.train.pretrain", "ssl_vit.cli"])
        shared = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        shared |= {"CUDA_VISIBLE_DEVICES": "", "TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": "0"}
        arguments = ["pretrain", *options, "--out", out, *OPTIONS, "--trainer.devices", str(ranks), "--trainer.strategy", "ddp"]
        ids = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
        self.processes = [context.Process(target=as_rank, args=(arguments, shared | own, Path.cwd())) for own in ids]
        for process in self.processes:
            process.start()

    def wait(self) -> None:
        for rank, process in enumerate(self.processes):
            process.join(timeout=300)
            process.kill()
            assert process.exitcode == 0, Path(f"rank{rank}.log").read_text()

    def kill(self) -> None:
        for process in self.processes:
            process.kill()  # SIGKILL
        for process in self.processes:
            process.join()


def as_rank(arguments: list[str], variables: dict[str, str], folder: Path) -> None:
    os.environ |= variables
    os.chdir(folder)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of the data workers, as in a process of its own
    rank_zero_only.rank = int(variables["RANK"])  # type: ignore[attr-defined]  # Lightning reads the variable when it is imported
    with open(f"rank{variables['RANK']}.log", "w") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    sys.exit(run(arguments))


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
    Ranks(ranks, "several", recipe, *options).wait()
    assert json.loads(Path("several/run.json").read_text())["devices"] == f"{ranks} x cpu"
    assert_the_same_run("one", "several", recipe, *options)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(("method", "readout"), [(method, readout) for method in READOUTS for readout in READOUTS[method]])
def test_two_and_four_processes_train_what_one_trains(ranks: int, method: str, readout: str) -> None:
    compare(ranks, f"{method}.yaml", "--readout", readout)


STREAMED = ("--data.decode", "stream", "--data.workers")
PATHS = {"memory": ("--data.decode", "memory"), "stream, no worker": (*STREAMED, "0"), "stream, 2 workers": (*STREAMED, "2")}
FAST = [("dino", "stream, 2 workers", 1), ("mae", "stream, no worker", 2), ("dino", "memory", 2)]
ALL = [(method, path, accumulate) for method in READOUTS for path in PATHS for accumulate in (1, 2)]


@pytest.mark.parametrize(
    ("method", "path", "accumulate"), [pytest.param(*case, marks=[] if case in FAST else pytest.mark.slow) for case in ALL]
)
def test_two_processes_train_what_one_trains_by_every_data_path(method: str, path: str, accumulate: int) -> None:
    """In float64, where the order of additions is far below everything else."""
    options = (*PATHS[path], *EXACT)
    alone("one", f"{method}.yaml", *options)
    Ranks(2, "several", f"{method}.yaml", *options, "--accumulate", str(accumulate)).wait()
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
    first = Ranks(ranks[0], "killed", *options, *kept)
    deadline = time.monotonic() + 200
    while not Path("killed/epoch-0002.ckpt").exists() and first.processes[0].is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    first.kill()
    assert 6 <= read_checkpoint("killed/last.ckpt")["global_step"] < 45
    assert not Path("killed/run.json").exists()
    Ranks(ranks[1], "killed", *options, *kept, "--resume").wait()
    assert json.loads(Path("killed/run.json").read_text())["steps"] == 45
    alone("one", *options)
    assert_the_same_run("one", "killed", *options)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dino", "mae"])
def test_four_processes_that_are_resumed_end_in_the_same_bits(method: str) -> None:
    """In float32, where the order in which four gradients are added shows."""
    options = (f"{method}.yaml", "--keep_every_epochs", "1")
    Ranks(4, "whole", *options).wait()
    for name, of in (("last.ckpt", "epoch-0001.ckpt"), ("recipe.yaml", "recipe.yaml")):
        Path("resumed").mkdir(exist_ok=True)
        shutil.copy(Path("whole", of), Path("resumed", name))
    Ranks(4, "resumed", *options, "--resume").wait()
    one, other = weights("whole"), weights("resumed")
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_torchrun_with_two_nodes() -> None:
    """Two launchers of one process each, as on two machines: one writes, the other does not."""
    launcher = f"-m torch.distributed.run --nnodes 2 --nproc-per-node 1 --master-addr 127.0.0.1 --master-port {free_port()}".split()
    options = ["mae.yaml", "--trainer.devices", "1", "--trainer.num_nodes", "2", "--trainer.strategy", "ddp"]
    commands = [[sys.executable, *launcher, "--node-rank", str(node), *command("several", *options)] for node in range(2)]
    done = started(commands, [{}, {}])
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
    own = [sys.executable, *command("several", "mae.yaml", "--trainer.devices", "2", "--trainer.strategy", "ddp")]
    done = started([own, own], slurm_tasks())
    assert [code for code, _ in done] == [0, 0], done
    assert ["7 steps" in output for _, output in done] == [True, False]
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
    done = started([[sys.executable, *command(folder, *options)] for folder in ("first", "second")], slurm_tasks())
    assert [code for code, _ in done] == [2, 2], done
    assert all("they must share it" in output and "Traceback" not in output for _, output in done), done
