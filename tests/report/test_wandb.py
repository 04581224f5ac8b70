"""The W&B Report: saved to a server on loopback by the real client, and read back as the spec that W&B would show.

The snapshot is written anew by `SSL_VIT_SNAPSHOTS=write python -m pytest tests/report/test_wandb.py`.
"""

import json
import os
import pty
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from io import TextIOWrapper
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ssl_vit.errors import Failure, UsageError
from ssl_vit_eval.compare.arms import Arm
from ssl_vit_eval.compare.comparison import Comparison, build
from ssl_vit_eval.compare.notes import Note
from ssl_vit_eval.compare.runs import Run
from ssl_vit_eval.compare.verdict import Difference, Family, Side
from ssl_vit_eval.report.table import Sheet, frame_of
from ssl_vit_eval.report.text import rule_text
from ssl_vit_eval.report.wandb import write_wandb_report
from ssl_vit_eval.rows import RowStore
from ssl_vit_eval.tracking import summary_key
from tests.fake_wandb import FakeWandb
from tests.planted import plant, plant_random
from tests.saved_reports import grids, keep_reports, panels, saved, text_of

SNAPSHOT = Path(__file__).parents[1] / "snapshots" / "wandb_report.json"
TABLE = Sheet("costs", "What it cost", frame_of([{"arm": "cls|gap", "seconds": 12}]), "One device.")
pytestmark = pytest.mark.filterwarnings("ignore::pydantic.PydanticDeprecatedSince20")  # of wandb_workspaces itself


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeWandb]:
    """A server with the project team/proj; the client forgets what it learnt from the environment before and after."""
    import wandb

    wandb.teardown()
    with FakeWandb() as server:
        keep_reports(server)
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server
        server.up()  # or wandb's service asks again for minutes before it ends
        wandb.teardown()


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """Two recipes, arms cls and gap, two seeds, read with both by two protocols, and their starts."""
    folder = tmp_path_factory.mktemp("compared")
    store = RowStore(folder)
    answers = torch.Generator().manual_seed(0)
    for protocol, recipe, seed, read in product(("knn", "linear"), ("toy", "other"), (0, 1), ("cls", "gap")):
        common = {"protocol": protocol, "seed": seed, "read_with": read, "family": recipe}
        start = f"start-{recipe}-{seed}"
        for trained in ("cls", "gap"):
            names = {"trained_with": trained, "source": f"{recipe}-{trained}-s{seed}", "init": start}
            plant(store, torch.rand(20, generator=answers) < 0.7, **names, **common)
        plant_random(store, torch.rand(20, generator=answers) < 0.5, start, **{**common, "source": f"random:{recipe}"})
    return build([folder])


def family(comparison: Comparison, scope: str = "dino (toy)", **changes: Any) -> Family:
    arms = [Arm("dino", "toy", spec) for spec in ("cls", "gap")]
    sides = [Side(arm, str(arm.trained_with)) for arm in arms]
    numbers = {"points": 1.2, "low": 0.3, "high": 2.1, "p": 0.031, "corrected": 0.031, "discordance": 0.081, "resolvable": 1.5}
    difference = Difference(*sides, **numbers, seeds=(0, 1), of_seeds=(1.0, 1.4), images=40, outcome="better")
    values: dict[str, Any] = {"question": "trained with", "setting": comparison.tables[0].setting, "scope": scope, "unit": "seeds"}
    return Family(**values | changes, differences=[difference])


def pretraining(recipe: str, readout: str, seed: int, group: str = "study") -> dict[str, Any]:
    config = {"readout": readout, "seed": seed, "method": "dino"}
    return {"group": group, "jobType": "pretrain", "config": config, "summary": {"checkpoint": f"weights-of-{recipe}-{readout}-s{seed}"}}


def evaluation(checkpoint: str, trained_with: str | None, group: str = "study") -> dict[str, Any]:
    return {"group": group, "jobType": "eval", "config": {"checkpoint": checkpoint, "trained_with": trained_with}, "summary": {}}


def test_saved_report_is_the_snapshot(server: FakeWandb, compared: Comparison) -> None:
    families = [family(compared), family(compared, primary=True)]
    comparison = replace(compared, sections=compared.sections[:1], notes=[Note("cut", {"line": "one seed is missing"})], families=families)
    url = write_wandb_report(comparison, "team/proj", "study", [TABLE])
    view = saved(server)
    assert url == f"{server.url}/team/proj/reports/Readouts-compared-study--VIEW"
    assert (view["entityName"], view["projectName"]) == ("team", "proj")
    # texts have tests of their own: other words need no other snapshot
    blocks = [block if block["type"] == "panel-grid" else block["type"] for block in view["spec"]["blocks"]]
    found = {"wandb-workspaces": version("wandb-workspaces"), "title": view["displayName"], **view["spec"], "blocks": blocks}
    (pictures,) = server.runs
    text = json.dumps(without_ids(found), indent=1, ensure_ascii=False).replace(pictures, "PICTURES") + "\n"
    if os.environ.get("SSL_VIT_SNAPSHOTS") == "write":
        SNAPSHOT.parent.mkdir(exist_ok=True)
        SNAPSHOT.write_text(text)
    before = json.loads(SNAPSHOT.read_text())
    if before["wandb-workspaces"] != found["wandb-workspaces"]:
        pytest.skip(f"the snapshot is of wandb-workspaces {before['wandb-workspaces']}, this is {found['wandb-workspaces']}")
    assert json.loads(text) == before


def without_ids(value: Any) -> Any:
    """What W&B names at random is left out."""
    if isinstance(value, dict):
        return {key: without_ids(item) for key, item in value.items() if key not in ("id", "__id__") or not isinstance(item, str)}
    return [without_ids(item) for item in value] if isinstance(value, list) else value


def test_text_has_the_primary_first_then_every_difference_the_rule_and_the_notes(server: FakeWandb, compared: Comparison) -> None:
    others = [
        family(compared, f"words of {question}", question=question)
        for question in ("norm", "trained with", "self-consistency", "read with")
    ]
    families = [*others, family(compared, "the declared words", primary=True)]
    write_wandb_report(replace(compared, notes=[Note("cut", {"line": "half a seed"})], families=families), "team/proj", "study", [TABLE])
    texts = [text_of(block) for block in saved(server)["spec"]["blocks"] if block["type"] != "panel-grid"]
    first = next(number for number, text in enumerate(texts) if "the declared words, " in text)
    assert texts[first].startswith("BETTER. Declared before training, ")
    assert not any("words of" in text for text in texts[:first])
    whole = "\n".join(texts)
    for question in ("norm", "trained with", "self-consistency", "read with"):
        assert f"words of {question}, " in whole
    numbers = "cls | gap | +1.2 | +0.3 | +2.1 | better | .031 | {} | 8.1 | 2 | 1.5 |"
    assert [whole.count(numbers.format(corrected)) for corrected in (".031", "–")] == [4, 1]
    assert whole.index("the declared words") < whole.index("words of trained with")
    assert rule_text(compared.rule) in whole
    assert "half a seed." in whole
    assert "| cls\\|gap | 12 |" in whole


def test_run_sets_hold_the_compared_runs_of_one_recipe_by_arm(server: FakeWandb, compared: Comparison) -> None:
    write_wandb_report(compared, "team/proj", "study")
    found = grids(saved(server)["spec"])
    for recipe, kind in ((recipe, kind) for recipe in ("toy", "other") for kind in ("eval", "pretrain")):
        another = {"toy": "other", "other": "toy"}[recipe]
        if kind == "eval":
            wanted = [evaluation(f"weights-of-{recipe}-{arm}-s{seed}", arm) for arm in ("cls", "gap") for seed in (0, 1)]
            wanted += [evaluation(f"start-{recipe}-{seed}", None) for seed in (0, 1)]
            strange = [evaluation(f"weights-of-{another}-cls-s0", "cls"), evaluation(f"weights-of-{recipe}-cls-s0", "cls", group="before")]
        else:
            wanted = [pretraining(recipe, arm, seed) for arm in ("cls", "gap") for seed in (0, 1)]
            strange = [pretraining(another, "cls", 0), pretraining(recipe, "cls", 0, group="before"), pretraining(recipe, "cls", 2)]
            strange += [evaluation(f"weights-of-{recipe}-cls-s0", "cls")]
        matching = [grid for grid in found if all(map(grid.holds, wanted))]
        assert not any(grid.holds(run) for grid in matching for run in strange)
        # one for the means over seeds, with an arm for a group, and one run by run
        assert [grid.grouping for grid in matching] == [["config:trained_with.value" if kind == "eval" else "config:readout.value"], []]
        assert all(grid.runs["project"] == {"name": "proj", "entityName": "team", "id": "7"} for grid in matching)


def test_panels_show_every_data_set_with_means_over_seeds_and_their_spread(server: FakeWandb, compared: Comparison) -> None:
    datasets = ("builtin:photos", "someone/pets-1.0", *(f"set{number}" for number in range(10)))
    metric = {dataset: "top1_macro" if "pets" in dataset else "top1" for dataset in datasets}
    tables = [
        replace(table, setting=table.setting._replace(dataset=dataset), metric=metric[dataset])
        for dataset in datasets
        for table in compared.tables
    ]
    write_wandb_report(replace(compared, tables=tables), "team/proj", None)
    spec = saved(server)["spec"]
    bars, curves = panels(spec, "Bar Chart"), panels(spec, "Run History Line Plot")
    recipes = 2
    assert [(config["chartTitle"], config["metrics"]) for _, config in bars] == recipes * [
        (
            f"{dataset}, {protocol}: {'macro top-1' if 'pets' in dataset else 'top-1'}",
            [summary_key(dataset, protocol, read, metric[dataset]) for read in ("cls", "gap")],
        )
        for dataset in datasets
        for protocol in ("knn", "linear")
    ]
    assert len(curves) == recipes
    for by, found in (("trained_with.value", bars), ("readout.value", curves)):
        for grid, config in found:
            assert (config["groupBy"], config["groupAgg"], config["groupArea"], config["aggregate"]) == (by, "mean", "stddev", True)
            assert grid.grouping == [f"config:{by}"]
            assert config["limit"] >= 100
    assert [(config["xAxis"], config["yAxis"]) for _, config in panels(spec, "Scatter Plot")] == recipes * [
        tuple(f"summary:{summary_key(dataset, protocol, 'trained', metric[dataset])}" for protocol in ("knn", "linear"))
        for dataset in datasets
    ]
    assert len(panels(spec, "Run Comparer")) == recipes
    for grid in grids(spec):
        places = [tuple(panel["layout"].values()) for panel in grid.panels]
        assert all(x + w <= 24 for x, _, w, _ in places)
        covered = [(x + right, y + down) for x, y, w, h in places for right in range(w) for down in range(h)]
        assert len(covered) == len(set(covered)), "panels lie over each other"


def test_curves_are_those_that_were_logged(server: FakeWandb, compared: Comparison, tmp_path: Path) -> None:
    records = [{"step": 10, "loss": 2.0, "teacher_information": 0.3}, {"step": 10, "knn_top1": 0.5}]
    run = Run(tmp_path / "toy-cls-s0", {"method": "dino", "readout": "cls", "seed": 0}, None, records)
    write_wandb_report(replace(compared, sections=compared.sections[:1], runs=[run]), "team/proj", "study")
    curves = [config for _, config in panels(saved(server)["spec"], "Run History Line Plot")]
    assert [config["metrics"] for config in curves] == [["loss"], ["teacher_information"], ["knn_top1"]]
    assert {config["xAxis"] for config in curves} == {"trainer/global_step"}


def test_what_was_not_trained_here_has_a_grid_of_its_own(server: FakeWandb, tmp_path: Path) -> None:
    changes = {"method": "timm", "trained_with": None, "seed": None, "init": None, "checkpoint": "downloaded", "source": "timm:vit"}
    store = RowStore(tmp_path)
    plant(store, torch.ones(20), **changes)
    plant(store, torch.ones(20))
    write_wandb_report(build([tmp_path]), "team/proj", None)
    *ours, others = grids(saved(server)["spec"])
    run = evaluation("downloaded", None)
    assert others.holds(run)
    assert not any(grid.holds(run) for grid in ours)
    assert not others.holds(evaluation("weights-of-toy-cls-s0", "cls"))
    assert others.grouping == ["config:source.value"]
    assert [panel["config"]["metrics"] for panel in others.panels] == [[summary_key("builtin:photos", "knn", "cls", "top1")]]


def test_pictures_are_a_run_of_their_own_that_the_report_shows(server: FakeWandb, compared: Comparison, tmp_path: Path) -> None:
    runs = []
    for readout, seed in (("cls", 0), ("cls", 1), ("gap", 0)):
        folder = tmp_path / f"m.ae-{readout}-s{seed}"
        folder.mkdir()
        Image.new("RGB", (4, 4), (seed, 7, 7)).save(folder / "reconstructions.png")
        runs.append(Run(folder, {"method": "mae", "readout": readout, "seed": seed}, None, []))
    primary = family(compared, "cls is better than gap", primary=True)
    write_wandb_report(replace(compared, sections=[], tables=[], runs=runs, families=[primary]), "team/proj", "study")
    (run,) = server.runs.values()
    assert (run.entity, run.project, run.group, run.job_type, run.exit_code) == ("team", "proj", "study", "report", 0)
    media = panels(saved(server)["spec"], "Media Browser")
    keys = [key for _, config in media for key in config["mediaKeys"]]
    assert all(grid.holds({"name": run.id}) and not grid.holds({"name": "another"}) for grid, _ in media)
    assert keys[-2:] == ["figures/reconstructions-0-m_ae-cls", "figures/reconstructions-1-m_ae-gap"]
    assert [key.split("/")[0] for key in keys] == ["figures"] * len(keys)
    assert [run.summary[key]["captions"] for key in keys[-2:]] == [["m.ae, trained with cls, seed 0"], ["m.ae, trained with gap, seed 0"]]
    for key in keys:
        assert [name for name in run.files if name.startswith(f"media/images/{key}_")], f"{key} was not uploaded"


def test_one_evaluation_alone_is_reported_without_a_verdict(server: FakeWandb, tmp_path: Path) -> None:
    plant(RowStore(tmp_path), torch.ones(20))
    write_wandb_report(build([tmp_path]), "proj", "a=b<c>'d'")  # of the user's own entity
    view = saved(server)
    assert view["entityName"] == "tester"
    assert not panels(view["spec"], "Scatter Plot")
    assert grids(view["spec"])[0].holds(evaluation("weights-of-toy-cls-s0", "cls", group="a=b<c>'d'"))


def test_missing_project_is_said(server: FakeWandb, tmp_path: Path) -> None:
    plant(RowStore(tmp_path), torch.ones(20))
    with pytest.raises(UsageError, match=r"^W&B has no project team/typo that is yours: log the runs to it first"):
        write_wandb_report(build([tmp_path]), "team/typo", None)
    assert not [name for name, _ in server.calls if name in ("upsertView", "CreateProject", "UpsertBucket")]


def test_server_that_is_down_or_refuses_is_said_in_one_line(server: FakeWandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(RowStore(tmp_path), torch.ones(20))
    server.answers.pop("upsertView")
    with pytest.raises(Failure, match=r"^the W&B Report could not be written: .*upsertView.*tries again$"):
        write_wandb_report(build([tmp_path]), "team/proj", None)
    server.down()
    monkeypatch.setattr("wandb.Api._HTTP_TIMEOUT", 1)
    with pytest.raises(Failure, match=r"^the W&B Report could not be written: [^\n]*tries again$"):
        write_wandb_report(build([tmp_path]), "team/proj", None)


def test_offline_and_missing_package_are_said(server: FakeWandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(RowStore(tmp_path), torch.ones(20))
    monkeypatch.setenv("WANDB_MODE", "offline")
    with pytest.raises(UsageError, match="WANDB_MODE is offline; unset it"):
        write_wandb_report(build([tmp_path]), "team/proj", None)
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", None)
    with pytest.raises(UsageError, match=r'pip install "ssl-vit\[report\]"'):
        write_wandb_report(build([tmp_path]), "team/proj", None)
    assert not server.calls


def test_without_an_account_nobody_is_asked_even_at_a_terminal(server: FakeWandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(RowStore(tmp_path), torch.ones(20))
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("TERM", "xterm")
    screen, terminal = pty.openpty()
    os.write(screen, b"\x04" * 9)  # whoever asks there is hung up on
    with open(screen, "rb", buffering=0), open(terminal, "rb", buffering=0) as raw, TextIOWrapper(raw) as console:
        monkeypatch.setattr(sys, "stdin", console)
        monkeypatch.setattr(sys, "stderr", console)
        with pytest.raises(UsageError, match=r"^--wandb needs a W&B account: run `wandb login`, or set WANDB_API_KEY$"):
            write_wandb_report(build([tmp_path]), "team/proj", None)
