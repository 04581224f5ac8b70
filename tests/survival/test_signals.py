"""SIGTERM, SIGUSR1, SIGHUP and Ctrl-C, sent to real processes: saved within a step, exit code 128 + signal, and the run goes on exactly."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import yaml
from lightning import Trainer
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop

from ssl_vit.cli import run
from ssl_vit.errors import Failure, Interrupted
from ssl_vit.methods import Method
from ssl_vit.train.pretrain import pretrain
from ssl_vit.train.signals import Signals
from ssl_vit.weights.checkpoint import read_checkpoint
from tests.data.test_stream import ended
from tests.processes import Command, ranks
from tests.train.test_ranks_pretrain import slurm_tasks

pytestmark = pytest.mark.usefixtures("pictures_and_recipes")
STEPS = 60
OPTIONS = ("--trainer.accelerator", "cpu", "--trainer.log_every_n_steps", "1", "--trainer.max_steps", f"{STEPS}")
TWO = ("--trainer.devices", "2", "--trainer.strategy", "ddp")
CODES = {signal.SIGTERM: 143, signal.SIGUSR1: 138, signal.SIGHUP: 129, signal.SIGINT: 130}


def slow_down(seconds: float = 0.05) -> None:
    """So that a signal comes in the middle of the run, whatever the machine."""
    original = Method.on_before_optimizer_step

    def slowly(self: Method, optimizer: Any) -> None:
        time.sleep(seconds)
        original(self, optimizer)

    Method.on_before_optimizer_step = slowly  # type: ignore[method-assign]


def hold(step: int) -> None:
    """This step goes on once there is a file `go-STEP`; `held-STEP-RANK` says that it waits."""
    original = Method.on_before_optimizer_step

    def held(self: Method, optimizer: Any) -> None:
        if self.global_step + 1 == step:
            Path(f"held-{step}-{self.global_rank}").touch()
            while not Path(f"go-{step}").exists():
                time.sleep(0.01)
        original(self, optimizer)

    Method.on_before_optimizer_step = held  # type: ignore[method-assign]


def hold_and_watch(step: int) -> None:
    """And `asked` says whether Lightning speaks to the other processes at every step, which a GPU would wait for."""
    hold(step)
    _TrainingEpochLoop._broadcast_sigterm_tensor = lambda self: Path("asked").touch()  # type: ignore[method-assign]


def go_on(step: int) -> None:
    time.sleep(0.3)  # the signals have come
    Path(f"go-{step}").touch()


def steps(folder: str) -> list[int]:
    file = Path(folder, "metrics.jsonl")
    return [json.loads(line)["step"] for line in file.read_text().split("\n")[:-1]] if file.exists() else []


def wait_for_step(step: int, folder: str, process: Command) -> None:
    until = time.monotonic() + 100
    while not any(found >= step for found in steps(folder)):
        assert process.running, process.said
        assert time.monotonic() < until, process.said
        time.sleep(0.01)


def saved(folder: str) -> int:
    return int(read_checkpoint(f"{folder}/last.ckpt")["global_step"])


def same_weights(one: str, other: str) -> bool:
    first, second = (read_checkpoint(f"{folder}/last.ckpt")["state_dict"] for folder in (one, other))
    return all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, *(pytest.param(number, marks=pytest.mark.survival) for number in CODES if number != signal.SIGTERM)]
)
def test_a_signal_saves_within_a_step_and_the_run_goes_on_exactly(number: signal.Signals) -> None:
    command = ("pretrain", "mae.yaml", "--out", "run", *OPTIONS, "--resume", "auto")
    for step in (3, 10):  # of a new run, and of one that goes on
        process = Command(*command, before=partial(hold, step))
        process.wait_for(f"held-{step}-0")
        process.send(number)
        go_on(step)
        assert process.wait(30) == CODES[number], process.said
        assert process.said.splitlines()[-1] == f"ssl-vit: stopped at step {saved('run')} and saved run/last.ckpt; go on with --resume"
        assert "Traceback" not in process.said
        assert saved("run") == steps("run")[-1] == step  # the one that was under way
    assert run(list(command)) == 0
    assert run(["pretrain", "mae.yaml", "--out", "whole", *OPTIONS]) == 0
    assert same_weights("run", "whole")


def ignore() -> None:
    slow_down(0.01)
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def test_ignored_signals_stay_ignored() -> None:
    """As under nohup, and in the background of a shell without job control."""
    process = Command("pretrain", "mae.yaml", "--out", "run", *OPTIONS[:-1], "40", before=ignore)
    wait_for_step(3, "run", process)
    for number in (signal.SIGHUP, signal.SIGINT):
        process.send(number)
    assert process.wait(60) == 0, process.said


def block() -> None:
    """Step 5 takes ten minutes."""
    original = Method.on_before_optimizer_step

    def blocked(self: Method, optimizer: Any) -> None:
        if self.global_step == 4:
            Path("blocked").touch()
            time.sleep(600)
        original(self, optimizer)

    Method.on_before_optimizer_step = blocked  # type: ignore[method-assign]


def test_ctrl_c_twice_leaves_at_once() -> None:
    process = Command("pretrain", "mae.yaml", "--out", "run", *OPTIONS, before=block)
    process.wait_for("blocked")
    process.send(signal.SIGINT)
    time.sleep(1.0)
    assert process.running
    process.send(signal.SIGINT)
    assert process.wait(5) in (-signal.SIGINT, 130)


def requeue(number: int, frame: Any) -> None:
    Path("requeued").write_text(str(saved("run")))
    sys.exit(-1)


def submitit() -> None:
    hold(5)
    signal.signal(signal.SIGUSR2, requeue)
    signal.signal(signal.SIGTERM, lambda number, frame: None)


@pytest.mark.parametrize("sent", [(signal.SIGUSR2,), (signal.SIGTERM, signal.SIGUSR2)])
def test_a_handler_that_was_there_follows_the_checkpoint(sent: tuple[signal.Signals, ...]) -> None:
    """submitit's, which puts its job back into the queue and ends the process; Slurm sends SIGTERM along where it preempts."""
    process = Command("pretrain", "mae.yaml", "--out", "run", *OPTIONS, before=submitit)
    process.wait_for("held-5-0")
    for number in sent:
        process.send(number)
        time.sleep(0.3)
    go_on(5)
    assert process.wait(30) == 255, process.said
    assert int(Path("requeued").read_text()) == saved("run") == 5


def test_a_handler_of_c_code_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python has no name for it, and could not give it back."""
    there = signal.getsignal
    monkeypatch.setattr(signal, "getsignal", lambda number: None if number == signal.SIGUSR1 else there(number))
    before, signals = there(signal.SIGUSR1), Signals()
    signals.take(0)
    try:
        assert there(signal.SIGUSR1) is before
    finally:
        signals.give_back()


@pytest.mark.parametrize(
    ("number", "to"),
    [
        (signal.SIGTERM, "rank 1"),
        *(pytest.param(signal.SIGTERM, to, marks=pytest.mark.survival) for to in ("rank 0", "both")),
        pytest.param(signal.SIGUSR1, "rank 0", marks=pytest.mark.survival),
        pytest.param(signal.SIGINT, "both", marks=pytest.mark.survival),
    ],
)
def test_ranks_agree_on_the_step(number: signal.Signals, to: str) -> None:
    """As torchrun and Slurm start them; whichever process the signal reaches."""
    command = ("pretrain", "mae.yaml", "--out", "run", *OPTIONS, *TWO, "--resume", "auto")
    started = ranks(2, *command, before=partial(hold_and_watch, 5))
    for rank, process in enumerate(started):
        process.wait_for(f"held-5-{rank}")
    for rank, process in enumerate(started):
        if to in ("both", f"rank {rank}"):
            process.send(number)
    go_on(5)
    assert [process.wait(30) for process in started] == [CODES[number]] * 2, [process.said for process in started]
    assert saved("run") == 5
    assert not Path("asked").exists()
    for process in started:
        assert f"stopped at step {saved('run')} and saved run/last.ckpt" in process.said
        assert "Traceback" not in process.said
    assert [process.wait(100) for process in ranks(2, *command)] == [0, 0]
    assert [process.wait(100) for process in ranks(2, *command[:3], "whole", *OPTIONS, *TWO)] == [0, 0]
    assert same_weights("run", "whole")


@pytest.mark.survival
def test_slurm_s_signal_leaves_nothing_of_lightning_s() -> None:
    """Its own requeueing would write hpc_ckpt files into the working directory, which other runs load."""
    command = ("pretrain", "mae.yaml", "--out", "run", *OPTIONS, *TWO, "--resume", "auto")
    tasks = [Command(*command, before=slow_down, **task) for task in slurm_tasks()]
    wait_for_step(5, "run", tasks[0])
    for task in tasks:
        task.send(signal.SIGUSR1)
    assert [task.wait(30) for task in tasks] == [138, 138], [task.said for task in tasks]
    assert saved("run") >= 5
    assert not list(Path.cwd().rglob("hpc_ckpt*"))


def test_several_gpus_are_asked_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of an eighth of a second by a clock of our own; the GPU is not there, and what the others were sent is added by hand."""
    clock, exchanges, others = [0.0], list[float](), [0]

    def all_reduce(found: torch.Tensor, op: object) -> None:
        exchanges.append(clock[0])
        found[0] = max(found[0].item(), others[0])

    there = SimpleNamespace(all_reduce=all_reduce, ReduceOp=SimpleNamespace(MAX="max"))
    tensor = lambda values, **_: torch.tensor(values, dtype=torch.float64)  # noqa: E731
    monkeypatch.setattr("ssl_vit.train.signals.torch", SimpleNamespace(tensor=tensor, float64=None, distributed=there))
    monkeypatch.setattr("ssl_vit.train.signals.time", SimpleNamespace(monotonic=lambda: clock[0]))
    trainer = Mock(spec=Trainer, world_size=2, strategy=SimpleNamespace(root_device=SimpleNamespace(type="cuda")))
    signals, answers = Signals(), list[tuple[int, bool]]()
    signals.take(0)
    try:
        for step in range(1, 101):
            clock[0] = step / 8
            others[0] = signal.SIGTERM if step >= 45 else 0
            answers.append(signals.agreed(trainer, step, due=False))
    finally:
        signals.give_back()
    assert exchanges == [step / 8 for step in range(1, 101, 8)]
    assert next(step for step, (number, _) in enumerate(answers, 1) if number) == 49


def test_lightning_s_handler_is_never_there() -> None:
    """It would speak to the other processes from within the handler: at no moment, and here just before ours comes."""
    found = list[Any]()
    early = LambdaCallback(on_train_start=lambda *_: found.append(signal.getsignal(signal.SIGTERM)))
    pretrain("mae.yaml", ["--out", "run", "--trainer.accelerator", "cpu", "--trainer.max_steps", "1"], [early])
    assert found == [signal.SIG_DFL]


def test_of_several_signals_the_first_one_gives_the_code_and_sigusr2_is_nobody_s() -> None:
    signals = Signals()
    signals.take(0)
    try:
        assert signal.getsignal(signal.SIGUSR2) is signal.SIG_DFL  # of no meaning where submitit has no handler
        for number in (signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), number)
        assert signals.received == signal.SIGTERM
    finally:
        signals.give_back()


def test_a_signal_behind_the_last_step_is_answered_once_the_run_is_finished() -> None:
    late = LambdaCallback(on_train_end=lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted, match=r"stopped after 1 steps and saved run/last\.ckpt") as stopped:
        pretrain("mae.yaml", ["--out", "run", "--trainer.accelerator", "cpu", "--trainer.max_steps", "1"], [late])
    assert stopped.value.number == signal.SIGTERM
    assert Path("run/run.json").exists()


def test_in_another_thread_than_the_main_one_no_signal_is_taken() -> None:
    failed, signals = list[BaseException](), Signals()

    def take() -> None:
        try:
            signals.take(0)
        except BaseException as error:
            failed.append(error)

    (thread := threading.Thread(target=take)).start()
    thread.join()
    assert failed == []


def test_ctrl_c_before_the_first_step(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Lightning's answer to it is an exit."""

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ssl_vit.data.stream.ImageData.setup", interrupted)
    before = signal.getsignal(signal.SIGINT)
    assert run(["pretrain", "mae.yaml", "--out", "run", *OPTIONS]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "ssl-vit: interrupted"
    signal.signal(signal.SIGINT, before)  # Lightning, on its way out, ignores it


def test_handlers_are_given_back() -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    for out, options in (("run", ("--trainer.max_steps", "2")), ("bad", ("--data.source", "nowhere"))):
        run(["pretrain", "mae.yaml", "--out", out, "--trainer.accelerator", "cpu", *options])
        assert [signal.getsignal(number) for number in numbers] == before

    def fail(*_: object) -> None:
        raise Failure("in the middle of a step")

    failing = LambdaCallback(on_train_batch_start=fail)
    with pytest.raises(Failure, match="in the middle"):
        pretrain("mae.yaml", ["--out", "failed", "--trainer.accelerator", "cpu"], [failing])
    assert [signal.getsignal(number) for number in numbers] == before


LAUNCHERS = {
    "Lightning": [str(Path(sys.executable).parent / "ssl-vit")],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "ssl_vit"],
}


@pytest.mark.survival
@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("group", [False, True])
def test_launchers(launcher: str, number: signal.Signals, group: bool) -> None:
    """To the launcher alone, as a scheduler does, and to the whole group, as Slurm and a terminal do; with data workers in it."""
    command = [*LAUNCHERS[launcher], "pretrain", "mae.yaml", "--out", "run", *OPTIONS[:-1], "100000", *TWO]
    command += ["--data.decode", "stream", "--data.workers", "1"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    with Path("said").open("w") as said:
        process = subprocess.Popen(command, env=environment, stdout=said, stderr=said, start_new_session=True)
    until = time.monotonic() + 200
    while not any(step >= 5 for step in steps("run")):
        assert process.poll() is None, Path("said").read_text()
        assert time.monotonic() < until, Path("said").read_text()
        time.sleep(0.1)
    (os.killpg if group else os.kill)(process.pid, number)
    code, text = process.wait(60), Path("said").read_text()
    assert text.count(f"ssl-vit: stopped at step {saved('run')} and saved run/last.ckpt") == 2, text
    if launcher == "Lightning":
        assert code == CODES[number], text
        assert "Traceback" not in text
    else:
        assert code != 0


SCRIPT = """
import sys
sys.path[:0] = {path!r}
from tests.survival.test_signals import {what}
{what}()
from ssl_vit.cli import main
main()
"""


def launched(what: str) -> subprocess.Popen[bytes]:
    """A run on two processes that Lightning starts; each calls the function of this name first."""
    Path("script.py").write_text(SCRIPT.format(path=sys.path, what=what))
    command = [sys.executable, "script.py", "pretrain", "mae.yaml", "--out", "run", *OPTIONS[:-1], "100000", *TWO]
    with Path("said").open("w") as said:
        return subprocess.Popen(command, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, stdout=said, stderr=said)


def wait_for_files(process: subprocess.Popen[bytes], *names: str) -> None:
    until = time.monotonic() + 200
    while not all(Path(name).exists() for name in names):
        assert process.poll() is None, Path("said").read_text()
        assert time.monotonic() < until, Path("said").read_text()
        time.sleep(0.1)


def leave_late() -> None:
    """The process that has started the other one leaves behind it, by more than Lightning waits before it looks at that one's code."""
    hold(5)
    leave = Signals.leave

    def late(self: Signals, number: int, message: str) -> None:
        time.sleep(12 if os.environ["LOCAL_RANK"] == "0" else 0)
        leave(self, number, message)

    Signals.leave = late  # type: ignore[method-assign]


@pytest.mark.survival
def test_lightning_does_not_kill_the_process_that_leaves_last() -> None:
    """It takes 143, of one that it has started, for a failure."""
    process = launched("leave_late")
    wait_for_files(process, "held-5-0", "held-5-1")
    process.send_signal(signal.SIGTERM)
    go_on(5)
    assert process.wait(60) == 143, Path("said").read_text()
    assert saved("run") == 5


def stay() -> None:
    """The started process stays in step 5, for ten minutes."""
    original = Method.on_before_optimizer_step

    def staying(self: Method, optimizer: Any) -> None:
        if (self.global_step, self.global_rank) == (4, 1):
            Path("pid.partial").write_text(str(os.getpid()))
            Path("pid.partial").rename("pid")
            time.sleep(600)
        original(self, optimizer)

    Method.on_before_optimizer_step = staying  # type: ignore[method-assign]


@pytest.mark.survival
def test_a_process_that_lightning_has_started_ends_with_the_one_that_started_it() -> None:
    process = launched("stay")
    wait_for_files(process, "pid")
    process.kill()
    process.wait()
    pid, until = Path("pid").read_text(), time.monotonic() + 20
    while not ended(pid):
        if time.monotonic() > until:
            os.kill(int(pid), signal.SIGKILL)
            pytest.fail("it lives on")
        time.sleep(0.1)


@pytest.mark.survival
@pytest.mark.parametrize("number", [signal.SIGTERM])
def test_a_study_passes_it_on_to_the_cell_and_goes_on(number: signal.Signals) -> None:
    recipe = yaml.safe_load(Path("mae.yaml").read_text())
    recipe["data"]["source"], recipe["backbone"]["image_size"], recipe["crop"]["size"] = "builtin:photos-new", 32, 32
    recipe["trainer"]["max_steps"] = 60
    Path("mae.yaml").write_text(yaml.safe_dump(recipe))
    study = {"recipes": ["mae.yaml"], "trained_with": ["cls", "gap"], "seeds": [0], "data": ["builtin:photos-new"], "protocols": ["knn"]}
    Path("study.yaml").write_text(yaml.safe_dump({**study, "read_with": ["cls", "gap"]}))
    process = Command("study", "study.yaml", "--out", "out", before=slow_down)
    until = time.monotonic() + 100
    while not (logs := list(Path("out").glob("cells/*/metrics.jsonl"))):
        assert process.running, process.said
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send(number)
    assert process.wait(30) == CODES[number], process.said
    assert process.said.splitlines()[-1].endswith("; the same command goes on")
    assert 0 < saved(str(logs[0].parent)) < 60
    again = Command("study", "study.yaml", "--out", "out")
    assert again.wait() == 0, again.said
    whole = Command("study", "study.yaml", "--out", "whole")
    assert whole.wait() == 0, whole.said
    assert same_weights(str(logs[0].parent), f"whole/cells/{logs[0].parent.name}")
