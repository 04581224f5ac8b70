"""The dry run: what it says beforehand is what the study then does, and it writes nothing."""

import json
import re
from pathlib import Path

import pytest
import yaml

from ssl_vit.cli import run
from ssl_vit.train.dry_run import step_seconds
from ssl_vit.train.pretrain import parse_recipe
from ssl_vit_eval.study.dry_run import clock
from tests.conftest import errors

pytestmark = pytest.mark.usefixtures("three_classes")


def lines(text: str) -> dict[str, list[str]]:
    """The columns by what they begin with, of lines with columns."""
    return {parts[0]: parts[1:] for line in text.splitlines() if len(parts := re.split(r"  +", line)) > 3}


def test_a_dry_run_tells_what_the_study_then_does(capsys: pytest.CaptureFixture[str]) -> None:
    mae = yaml.safe_load(Path("mae.yaml").read_text())
    mae["trainer"] = {"max_epochs": 3, "limit_train_batches": 3}
    Path("mae.yaml").write_text(yaml.safe_dump(mae))
    study = {"recipes": ["dino.yaml", "mae.yaml"], "trained_with": ["gap"], "seeds": [0], "data": ["./pictures"]}
    study |= {"protocols": ["knn", "logreg"], "read_with": ["trained", "cls", "cls+gap"], "controls": ["width"], "diagnostics": True}
    Path("study.yaml").write_text(yaml.safe_dump(study))
    here = sorted(Path().rglob("*"))
    assert run(["study", "study.yaml", "--out", "out", "--dry-run"]) == 0
    assert sorted(Path().rglob("*")) == here
    text = capsys.readouterr().out
    before = lines(text)
    assert [name for name in before if "-s0" in name] == ["dino-gap-s0", "mae-gap-s0"]
    assert before["all: 2 cells"][:3] == before["still to do: 2 cells"][:3]
    assert "timed on this CPU" in text
    counts = {rule: int(count) for rule, count in re.findall(r"(knn|logreg) (\d+) \(0 done\)", text)}
    assert "their time is not estimated" in text

    assert run(["study", "study.yaml", "--out", "out"]) == 0
    capsys.readouterr()
    steps = images = 0
    for file in Path("out/cells").glob("*/run.json"):
        summary, told = json.loads(file.read_text()), before[file.parent.name]
        assert told[:3] == [str(summary["steps"]), str(summary["images"]), f"{summary['flops']:.2g}"]
        steps, images = steps + summary["steps"], images + summary["images"]
    assert before["all: 2 cells"][:2] == [str(steps), str(images)]
    rows = [json.loads(line) for line in Path("out/eval/rows.jsonl").read_text().splitlines()]
    of = [row["protocol"] for row in rows if row["metric"] == "top1"]
    assert [row["width"] for row in rows if row["method"] == "pixels"] == [3 * 16 * 16] * 2
    assert counts == {rule: of.count(rule) for rule in ("knn", "logreg")}

    assert run(["study", "study.yaml", "--out", "out", "--dry-run"]) == 0
    text = capsys.readouterr().out
    after = lines(text)
    assert after["still to do: 0 cells"][:4] == ["0", "0", "0", "0 s"]
    assert after["mae-gap-s0"][:3] == before["mae-gap-s0"][:3]
    assert after["mae-gap-s0"][4] == "done"
    assert f"knn {counts['knn']} ({counts['knn']} done)" in text
    assert "the rest takes 0 s" in text


def test_a_dry_run_looks_for_the_data(capsys: pytest.CaptureFixture[str]) -> None:
    study = {"recipes": ["mae.yaml"], "trained_with": ["cls"], "seeds": [0], "protocols": ["knn"], "read_with": ["cls"]}
    for source, says in {"./nowhere": "no such folder: ", "pictuers": "did you mean 'pictures'? read as a Hugging Face id"}.items():
        Path("study.yaml").write_text(yaml.safe_dump({**study, "data": ["./pictures", source]}))
        for dry in (["--dry-run"], []):
            assert run(["study", "study.yaml", "--out", "out", *dry]) == 2
            assert says in errors(capsys)[0]
            assert not Path("out").exists()
    Path("study.yaml").write_text(yaml.safe_dump({**study, "data": ["./pictures", "owner/name"]}))
    assert run(["study", "study.yaml", "--out", "out", "--dry-run"]) == 0
    assert "\ndata: owner/name: no folder here, so taken for Hugging Face ids" in capsys.readouterr().out


def test_a_finished_cell_tells_the_time_of_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    study = {"recipes": ["mae.yaml"], "trained_with": ["cls"], "seeds": [0, 1, 2], "data": ["./pictures"]}
    Path("study.yaml").write_text(yaml.safe_dump({**study, "protocols": ["knn"], "read_with": ["cls"]}))
    for seed, seconds in (0, 3000.0), (1, 6000.0):
        folder = Path(f"out/cells/mae-cls-s{seed}")
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps({"seconds": seconds, "steps": 3, "images": 24, "flops": 7}))
    assert run(["study", "study.yaml", "--out", "out", "--dry-run"]) == 0
    told = lines(capsys.readouterr().out)
    assert told["mae-cls-s2"][3:] == ["75 min", "as 2 done"]
    assert told["all: 3 cells"][3] == clock(13500.0) == "3.8 h"
    assert told["still to do: 1 cells"][3] == "75 min"


def test_the_time_of_a_step_follows_the_work() -> None:
    """Sixteen times the batch of a model that is not tiny."""
    options = ["--backbone.width", "192", "--backbone.heads", "3", "--backbone.depth", "4", "--trainer.devices", "1"]

    def seconds(*more: str) -> float:
        parser, config = parse_recipe("mae.yaml", [*options, *more])
        return step_seconds(config, parser.instantiate(config))

    small, large = seconds("--data.batch_size", "32"), seconds("--data.batch_size", "512")
    assert 4 < large / small < 64
