"""Engines: Slurm by a stand-in that really runs what is submitted, W&B by its own agent and a server on loopback."""

import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from ssl_vit.cli import run
from ssl_vit.files import locked
from tests.conftest import errors
from tests.fake_wandb import FakeWandb

pytestmark = pytest.mark.usefixtures("three_classes")

STUDY: dict[str, Any] = {
    "recipes": ["mae.yaml"],
    "trained_with": ["cls"],
    "seeds": [0],
    "data": ["./pictures"],
    "protocols": ["knn"],
    "read_with": ["trained"],
    "slurm": {"timeout_min": 60, "gpus_per_node": 1, "partition": "gpu", "slurm_qos": "low"},
}

# As Slurm does: the answer comes at once, the tasks of the array run later, each with what Slurm puts into the environment.
SBATCH = """
import os, re, subprocess, sys
script = os.path.abspath(sys.argv[1])
shape = re.search(r"--array=0-(\\d+)", open(script).read())
for task in range(int(shape[1]) + 1):
    env = {**os.environ, "SLURM_JOB_ID": str(77 + task), "SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": str(task), "SLURM_NTASKS": "1"}
    env |= {"SLURM_JOB_NUM_NODES": "1", "SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    env |= {"SLURM_JOB_NODELIST": "node1", "SLURM_JOB_NAME": "study"}
    job = f"sleep 0.5; bash {script}; echo $? > done-{task}"
    subprocess.Popen(["bash", "-c", job], env=env, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print("Submitted batch job 77")
"""
SRUN = """
import os, sys
arguments = sys.argv[1:]
command = arguments[arguments.index(next(a for a in arguments if "python" in a)):]
for stream, option in ((1, "--output"), (2, "--error")):
    path = arguments[arguments.index(option) + 1]
    for letter, name in (("%A", "SLURM_ARRAY_JOB_ID"), ("%a", "SLURM_ARRAY_TASK_ID"), ("%t", "SLURM_PROCID")):
        path = path.replace(letter, os.environ[name])
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
open("pid-" + os.environ["SLURM_ARRAY_TASK_ID"], "w").write(str(os.getpid()))
os.execvp(command[0], command)
"""
SCONTROL = """
import sys
open("requeued", "a").write(" ".join(sys.argv[1:]))
"""


def put_on_path(monkeypatch: pytest.MonkeyPatch, **programs: str) -> None:
    folder = Path("bin").absolute()
    folder.mkdir(exist_ok=True)
    for name, text in programs.items():
        (folder / name).write_text(f"#!{sys.executable}\n{text}")
        (folder / name).chmod((folder / name).stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:{Path(sys.executable).parent}:/usr/bin:/bin")


def wait_for(*files: str, seconds: float = 200.0) -> None:
    until = time.monotonic() + seconds
    while not all(Path(file).exists() for file in files):
        assert time.monotonic() < until, [path.read_text()[-2000:] for path in Path("out").rglob("*.err")]
        time.sleep(0.05)


def write(**changes: Any) -> None:
    Path("study.yaml").write_text(yaml.safe_dump({**STUDY, **changes}))


def rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("out/eval/rows.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The `srun` command is available")  # Lightning's, of the last run, which is no job
def test_slurm_runs_the_cells_and_the_command_finishes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    put_on_path(monkeypatch, sbatch=SBATCH, srun=SRUN, scontrol=SCONTROL)
    write(trained_with=["cls", "gap"])
    # one cell is long enough to be taken off its machine in the middle
    Path("mae.yaml").write_text(Path("mae.yaml").read_text().replace("max_steps: 3", "max_steps: 60"))
    assert run(["study", "study.yaml", "--out", "out", "--launcher", "slurm"]) == 0
    said = capsys.readouterr().out
    assert [line.split() for line in said.splitlines() if line.startswith("77")] == [
        ["77_0", "mae-cls-s0"],
        ["77_1", "mae-gap-s0"],
        ["77_2", "controls"],
    ]
    assert "`ssl-vit study study.yaml --out out` does what is missing" in said
    assert not Path("out/cells/mae-cls-s0/run.json").exists()  # it does not wait
    wait_for("out/cells/mae-cls-s0/metrics.jsonl")
    os.kill(int(Path("pid-0").read_text()), 12)  # SIGUSR2, as submitit asks Slurm to do before it takes the machine away
    wait_for("done-0", "done-1", "done-2")
    assert "77_0" in Path("requeued").read_text()
    assert Path("done-1").read_text() == Path("done-2").read_text() == "0\n"
    assert {row["source"] for row in rows()} == {"mae-gap-s0", "pixels:16", "random:mae"}
    text = Path("out/slurm/77_submission.sh").read_text()
    for line in ("--time=60", "--gpus-per-node=1", "--partition=gpu", "--qos=low", "--job-name=study"):
        assert f"#SBATCH {line}" in text

    with locked(Path("out/cells/mae-cls-s0.lock"), wait=False) as mine:
        assert mine  # nothing of the stopped job is in the way
    assert run(["study", "study.yaml", "--out", "out"]) == 0
    assert len(rows()) == 2 * (1 + 2 + 2)
    assert run(["study", "study.yaml", "--out", "out", "--launcher", "slurm"]) == 0
    assert "nothing is left to submit" in capsys.readouterr().out


def test_slurm_refuses_what_would_go_wrong_later(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    put_on_path(monkeypatch, sbatch="import sys; sys.exit('invalid partition')", srun="")
    launch = ["study", "study.yaml", "--out", "out", "--launcher", "slurm"]

    def refusal() -> str:
        assert run(launch) == 2
        (line,) = errors(capsys)
        return line

    for message, slurm in {
        "has no timeout_min": {"gpus_per_node": 1},
        "did you mean 'partition'?": {"timeout_min": 5, "partitoin": "gpu"},
        "slurm (a job is one process) has the unknown key 'nodes'": {"timeout_min": 5, "nodes": 2},
        "timeout_min is '5'; it should be a valid integer": {"timeout_min": "5"},
    }.items():
        write(slurm=slurm)
        assert message in refusal()
    write()
    assert run(launch) == 1
    assert "sbatch refused the jobs: invalid partition" in errors(capsys)[0]
    monkeypatch.setenv("PATH", "/nowhere")
    assert "needs sbatch, which is not on the PATH" in refusal()
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert 'needs submitit: pip install "ssl-vit[slurm]"' in refusal()
    assert run([*launch, "--dry-run"]) == 2
    assert "choose one" in errors(capsys)[0]


def test_a_cell_that_is_taken_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    write()
    with locked(Path("out/cells/mae-cls-s0.lock")):
        assert run(["study", "study.yaml", "--out", "out", "--cell", "mae-cls-s0"]) == 0
    assert "mae-cls-s0: another process works on it" in capsys.readouterr().out
    assert not Path("out/cells/mae-cls-s0").exists()


@pytest.mark.slow
def test_agents_of_a_sweep_take_the_cells(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    write()
    launch = ["study", "study.yaml", "--out", "out", "--launcher", "wandb"]
    assert run(launch) == 2
    assert "add --wandb [ENTITY/]PROJECT" in errors(capsys)[0]
    assert run([*launch, "--wandb", "tester/readouts"]) == 2  # the tests' own mode
    assert "W&B is set to offline" in errors(capsys)[0]
    with FakeWandb() as server:
        sweep: dict[str, Any] = {}

        def create(variables: dict[str, Any]) -> dict[str, Any]:
            sweep.update(variables)
            project = {"id": "p", "name": variables["projectName"], "entity": {"id": "e", "name": variables["entityName"]}}
            return {"upsertSweep": {"sweep": {"name": "s33p", "project": project}, "configValidationWarnings": []}}

        def heartbeat(variables: dict[str, Any]) -> dict[str, Any]:
            cells = yaml.safe_load(sweep["config"])["parameters"]["cell"]["values"]
            asked = sum(name == "Heartbeat" for name, _ in server.calls)
            run = {"type": "run", "run_id": "given", "program": "ssl-vit", "args": {"cell": {"value": cells[0]}}}
            return {"agentHeartbeat": {"agent": {"id": "a"}, "commands": json.dumps([run] if asked == 1 else [])}}

        server.answers |= {
            "UpsertSweep": create,
            "SweepWithRuns": lambda variables: {"project": {"sweep": {"config": sweep["config"], "runs": {"edges": []}}}},
            "CreateAgent": lambda variables: {"createAgent": {"agent": {"id": "a"}}},
            "Heartbeat": heartbeat,
        }
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        env = {**os.environ, **server.environment, "PATH": path}
        command = [sys.executable, "-m", "ssl_vit", *launch, "--wandb", "tester/readouts"]
        launched = subprocess.run(command, env=env, capture_output=True, text=True)
        assert launched.returncode == 0, launched.stderr
        assert "wandb agent tester/readouts/s33p" in launched.stdout
        config = yaml.safe_load(sweep["config"])
        assert (config["method"], config["name"]) == ("grid", "study")
        assert config["parameters"] == {"cell": {"values": ["mae-cls-s0", "controls"]}}

        agent = [sys.executable, "-m", "wandb", "agent", "--count", "1", "tester/readouts/s33p"]
        worked = subprocess.run(agent, env=env, capture_output=True, text=True, timeout=250)
        assert Path("out/cells/mae-cls-s0/run.json").exists(), worked.stderr[-3000:]
        assert {row["source"] for row in rows()} == {"mae-cls-s0"}
        kinds = {run.job_type: run for run in server.runs.values() if run.group == "study"}
        assert set(kinds) == {"pretrain", "eval"}
        assert "given" not in server.runs  # neither passes for the agent's
        assert {"mae", "cls"} <= set(kinds["pretrain"].tags)
