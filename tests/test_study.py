"""`ssl-vit study` as a command: resumed, refused, compared."""

import json
from pathlib import Path

import pytest
import yaml

from ssl_vit.cli import run
from tests.conftest import errors

pytestmark = pytest.mark.usefixtures("three_classes")


STUDY = {
    "recipes": ["dino.yaml", "mae.yaml"],
    "trained_with": ["cls", "gap"],
    "seeds": [0],
    "data": ["./pictures"],
    "protocols": ["knn"],
    "read_with": ["cls", "gap"],
}


def test_a_study_is_resumed_where_it_was_stopped(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import ssl_vit_eval.study as study

    Path("study.yaml").write_text(yaml.safe_dump(STUDY))
    trained: list[str] = []
    original = study.pretrain

    def counted(recipe: str, options: list[str]) -> Path:
        trained.append(options[options.index("--out") + 1])
        if len(trained) == 3:
            raise KeyboardInterrupt
        return original(recipe, options)

    monkeypatch.setattr(study, "pretrain", counted)
    assert run(["study", "study.yaml", "--out", "out"]) == 130
    assert not Path("out/report.html").exists()
    finished = {cell: cell.stat().st_mtime_ns for cell in Path("out/cells").glob("*/last.ckpt")}
    assert len(finished) == 2
    assert run(["study", "study.yaml", "--out", "out"]) == 0
    assert len(trained) == 5  # two, the interrupted one twice, the last
    assert all(cell.stat().st_mtime_ns == when for cell, when in finished.items())

    text = capsys.readouterr().out
    rows = [json.loads(line) for line in Path("out/eval/rows.jsonl").read_text().splitlines()]
    assert len({row["id"] for row in rows}) == len(rows) == 2 * (1 + (4 + 2) * 2)  # metrics x (pixels + (cells + random) x readouts)
    assert "mae trained with gap, read with gap" in text
    assert "over its random initialisation" in text
    report = Path("out/report.html").read_text()
    assert "data:image/png;base64" in report  # the reconstructions
    assert "<svg" in report  # the curves
    before = Path("out/eval/rows.jsonl").read_text()
    assert run(["study", "study.yaml", "--out", "out"]) == 0
    assert len(trained) == 5
    assert Path("out/eval/rows.jsonl").read_text() == before
    assert run(["compare", "out", "--out", "elsewhere"]) == 0
    assert Path("elsewhere/report.html").exists()


def test_a_study_with_a_changed_recipe_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    Path("study.yaml").write_text(yaml.safe_dump({**STUDY, "recipes": ["mae.yaml"]}))
    assert run(["study", "study.yaml", "--out", "out"]) == 0
    Path("mae.yaml").write_text(Path("mae.yaml").read_text().replace("max_steps: 3", "max_steps: 4"))
    assert run(["study", "study.yaml", "--out", "out"]) == 2
    assert "was trained with another recipe (trainer.max_steps 3 -> 4)" in errors(capsys)[0]


def test_a_study_refuses_before_anything_trains(capsys: pytest.CaptureFixture[str]) -> None:
    wrong = {
        "did you mean 'gap'?": {"trained_with": ["cls", "gpa"]},
        "needs registers > 5, got 2": {"trained_with": ["register5"]},
        "needs registers > 7, got 2": {"read_with": ["register7"]},
        "unknown recipe 'mea.yaml'": {"recipes": ["mae.yaml", "mea.yaml"]},
        "unknown protocol 'nkn'": {"protocols": ["nkn"]},
        "seeds is 0; give a list": {"seeds": 0},
        "trained_with is [1]; give a list of names": {"trained_with": [1]},
        "no embedded set 'builtin:typo'": {"data": ["./pictures", "builtin:typo"]},
        "two recipes of the study are called 'mae-cls-s0'": {"recipes": ["mae.yaml", "./mae.yaml"]},
    }
    for message, change in wrong.items():
        Path("study.yaml").write_text(yaml.safe_dump({**STUDY, **change}))
        assert run(["study", "study.yaml", "--out", "out"]) == 2, message
        lines = errors(capsys)
        assert len(lines) == 1, message
        assert message in lines[0]
        assert not Path("out").exists()
    Path("study.yaml").write_text(yaml.safe_dump(STUDY))
    assert run(["study", "study.yaml", "--out", "pictures"]) == 2
    assert "already holds something else" in errors(capsys)[0]
    Path("out").mkdir()
    Path("out/study.yaml").write_text(yaml.safe_dump({**STUDY, "seeds": [1]}))
    assert run(["study", "study.yaml", "--out", "out"]) == 2
    assert "holds a study with other seeds" in errors(capsys)[0]
