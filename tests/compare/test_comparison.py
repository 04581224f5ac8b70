"""The comparison: gains are the paired ones, nothing is averaged that differs, nothing missing is left out."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from ssl_vit.errors import Failure, UsageError
from ssl_vit_eval.compare.arms import Arm
from ssl_vit_eval.compare.comparison import Cell, Gain, build
from ssl_vit_eval.compare.runs import find_runs, short_name
from ssl_vit_eval.metrics import metric_of
from ssl_vit_eval.report.score_tables import differences, gain_text, score_text, scores, tables, under_text
from ssl_vit_eval.report.terminal import compare, screen
from ssl_vit_eval.report.text import signed
from ssl_vit_eval.rows import RowStore
from ssl_vit_eval.sources import family_of
from ssl_vit_eval.stats.seeds import accuracy_interval, crossed_interval
from tests.planted import families, notes, plant, plant_arm, plant_random

DINO_CLS = Arm("dino", "toy", "cls")


@pytest.fixture
def store(tmp_path: Path) -> RowStore:
    return RowStore(tmp_path / "eval")


def answers(accuracy: float, n: int = 400, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed)) < accuracy


def only_cell(store: RowStore, arm: Arm = DINO_CLS, read_with: str = "cls") -> Cell:
    (table,) = build([store.folder]).tables
    return table.cells[arm, read_with]


def test_gain_is_the_paired_difference_over_the_backbones_own_initialisation(store: RowStore) -> None:
    trained, start = answers(0.8), answers(0.6, seed=1)
    plant(store, trained)
    plant_random(store, start)
    # neighbours that must not be taken for it: another start, readout, protocol, version, data, transform
    plant_random(store, torch.zeros(400), start="another")
    for change in ({"read_with": "gap"}, {"protocol": "logreg"}, {"protocol_version": 2}, {"data": "other"}, {"transform": "resize64"}):
        plant_random(store, torch.zeros(400), **change)
    cell = build([store.folder]).tables[0].cells[DINO_CLS, "cls"]
    assert cell.gain is not None
    assert (cell.gain.points, cell.gain.low, cell.gain.high) == crossed_interval((trained.double() - start.double())[None, None])[:3]
    assert cell.gain.points == pytest.approx(100 * (trained.double().mean() - start.double().mean()).item())
    # and a loop over resampled images, of other random numbers, agrees to a few tenths of a point
    rng, difference = np.random.default_rng(7), trained.numpy().astype(float) - start.numpy()
    draws = [100 * difference[rng.integers(0, 400, 400)].mean() for _ in range(4000)]
    assert np.percentile(draws, [2.5, 97.5]) == pytest.approx([cell.gain.low, cell.gain.high], abs=0.6)
    classes = torch.arange(400) % 3
    assert cell.other == pytest.approx(np.mean([trained[classes == of].double().mean() for of in range(3)]))


@pytest.mark.parametrize("init", [None, "not evaluated"])
def test_without_its_baseline_a_cell_has_no_gain_and_that_is_said(store: RowStore, init: str | None) -> None:
    plant(store, answers(0.8), init=init)
    plant_random(store, answers(0.6))
    comparison = build([store.folder])
    assert comparison.tables[0].cells[DINO_CLS, "cls"].gain is None
    assert any("1 of 1 trained cells have no gain" in note for note in notes(comparison))


def test_what_was_not_measured_is_shown_as_missing(store: RowStore) -> None:
    plant(store, answers(0.8), read_with="cls+gap")
    plant(store, answers(0.8), trained_with="gap", read_with="gap", source="toy-gap-s0")
    plant(store, answers(0.8), trained_with="gap", read_with="gap", source="toy-gap-s0", dataset="other", data="other")
    comparison = build([store.folder])
    assert comparison.trained_with == ["cls", "gap"]
    assert comparison.read_with == ["gap", "cls+gap"]  # single tokens first
    for table in comparison.tables:
        assert comparison.trained(table) == [DINO_CLS, DINO_CLS._replace(trained_with="gap"), DINO_CLS._replace(trained_with=None)]
    shown = screen(comparison).split("\n\n")
    assert [line.split() for line in shown[0].splitlines()[2:]] == [["toy", "cls", "–", "79.8"], ["toy", "gap", "79.8*", "–"]]
    assert [line.split() for line in shown[1].splitlines()[2:]] == [["toy", "gap", "79.8*"]]  # no empty line, no empty column


@pytest.mark.parametrize(
    ("change", "said"),
    [({"protocol_version": 2}, "protocol version"), ({"data": "other"}, "data"), ({"transform": "resize64"}, "transform")],
)
def test_different_settings_are_different_tables(store: RowStore, change: dict[str, object], said: str) -> None:
    plant(store, answers(0.8), seed=0)
    plant(store, answers(0.5), seed=1, source="toy-cls-s1", **change)
    comparison = build([store.folder])
    assert [table.cells[DINO_CLS, "cls"].seeds for table in comparison.tables] == [1, 1]
    assert f"2 tables that differ in {said}: never averaged" in notes(comparison)[0]


def test_seeds_are_averaged_without_an_invented_interval(store: RowStore) -> None:
    accuracies, gains = [], []
    for seed in range(3):
        trained, start = answers(0.8, 300, seed), answers(0.6 + 0.1 * seed, 300, 20 + seed)
        plant(store, trained, seed=seed, source=f"toy-cls-s{seed}", init=f"start{seed}")
        plant_random(store, start, start=f"start{seed}", seed=seed)
        accuracies.append(trained.double().mean().item())
        gains.append(100 * (accuracies[-1] - start.double().mean().item()))
    cell = only_cell(store)
    assert (cell.seeds, cell.ci) == (3, None)
    assert cell.value == pytest.approx(np.mean(accuracies))
    assert cell.spread == pytest.approx(np.std(accuracies, ddof=1))
    assert cell.gain is not None
    shown = (cell.gain.points, cell.gain.low, cell.gain.high, cell.gain.seeds)
    assert shown == pytest.approx((np.mean(gains), min(gains), max(gains), 3))
    control = only_cell(store, DINO_CLS._replace(trained_with=None))
    assert control.seeds == 3
    assert score_text(cell).endswith(", n = 3")
    assert f"({signed(min(gains))[1:]} … {signed(max(gains))[1:]})" in under_text(cell)


def test_a_seed_without_its_baseline_is_said(store: RowStore) -> None:
    for seed in range(2):
        plant(store, answers(0.8, seed=seed), seed=seed, source=f"toy-cls-s{seed}", init=f"start{seed}")
    plant_random(store, answers(0.6), start="start0")
    comparison = build([store.folder])
    assert comparison.tables[0].cells[DINO_CLS, "cls"].gain.seeds == 1  # type: ignore[union-attr]
    assert any("gain over fewer seeds" in note for note in notes(comparison))


def test_different_recipes_and_equal_seeds_are_not_averaged(store: RowStore) -> None:
    plant(store, answers(0.8), source="toy-cls-s0")
    plant(store, answers(0.7), source="slow-cls-s0", family="slower")
    plant(store, answers(0.6), source="slow-cls-s0", family="slower", checkpoint="another")  # trained again, elsewhere
    plant(store, answers(0.5), source="slow-gap-s0", family="slowest", trained_with="gap", read_with="gap")
    comparison = build([store.folder])
    assert {cell.seeds for cell in comparison.tables[0].cells.values()} == {1}
    slow = [("dino", "slow slower weights-"), ("dino", "slow slower another"), ("dino", "slow slowest")]
    assert comparison.sections == [("dino", "toy"), *slow]
    assert "dino (slow): 2 recipes of this name differ in more than readout and seed" in notes(comparison)
    again = "dino (slow slower), trained with cls: 2 checkpoints of seed 0 (weights-, another); each of its checkpoints stands alone"
    assert again in notes(comparison)


def test_trainings_of_two_recipes_are_said_with_the_fields_that_differ(store: RowStore, tmp_path: Path) -> None:
    hashes = []
    for name, readout, lr in (("a", "cls", 0.1), ("b", "gap", 0.2)):
        recipe = {"method": "dino", "readout": readout, "seed": 0, "optim": {"lr": lr}}
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        hashes.append(family_of(recipe))
        plant(store, answers(0.8), source=name, trained_with=readout, read_with=readout, family=hashes[-1], checkpoint=name)
    said = "a and b cannot be compared as trainings, since they are of two recipes: "
    assert f"{said}name their run folders too, and it is said in which field" in notes(build([store.folder]))
    comparison = build([store.folder, tmp_path / "a", tmp_path / "b"])
    assert f"{said}optim.lr 0.1 -> 0.2" in notes(comparison)
    with store.file.open("a") as file:
        file.write('{"cut')
    text = " ".join(screen(build([store.folder, tmp_path / "a", tmp_path / "b"])).split())
    assert text.startswith("warning: ")
    assert f"warning: {said}optim.lr 0.1 -> 0.2" in text
    assert "rows.jsonl: the last line was cut short and is ignored" in text
    plant(store, answers(0.8), source="c", trained_with="gap", read_with="gap", family=hashes[0], checkpoint="c")
    assert not any("cannot be compared as trainings" in note for note in notes(build([store.folder])))


@pytest.mark.parametrize(
    ("names", "recipe"),
    [
        (("my_cls", "my_gap"), "dino_smoke"),
        (("one", "another"), "dino vit_tiny"),
        (("one-r1", "another-r1"), "dino"),  # rows of earlier versions do not know the recipe's name
        (("toy-cls-s0", "toy-gap-s0"), "toy"),
    ],
)
def test_arms_are_joined_by_what_the_rows_hold_and_not_by_the_folder(store: RowStore, names: tuple[str, str], recipe: str) -> None:
    for seed in (0, 1):
        for name, readout in zip(names, ("cls", "gap"), strict=True):
            source = name.replace("s0", f"s{seed}") if "-s0" in name else f"{name}{seed or ''}"
            for network in ("", ":student"):
                own = {"init": f"start{seed}", "seed": seed, "source": source + network, "trained_with": readout}
                own["recipe_name"] = None if recipe == "dino" else recipe
                for read_with in ("cls", "gap"):
                    plant(store, answers(0.8), read_with=read_with, **own)
    comparison = build([store.folder])
    assert comparison.sections == [("dino", recipe), ("dino", f"{recipe}:student")]
    (table,) = comparison.tables
    arms = [("dino", name, spec) for _, name in comparison.sections for spec in ("cls", "gap")]
    assert [arm for arm in comparison.trained(table) if arm.trained_with] == arms
    assert {cell.seeds for cell in table.cells.values()} == {2}
    assert {family.scope for family in comparison.families if family.question == "trained with"} == {
        f"dino ({name})" for _, name in comparison.sections
    }
    assert comparison.sections[0] == ("dino", recipe)
    assert not any("are they" in note or "stands alone" in note for note in notes(comparison))


@pytest.mark.parametrize(("dataset", "lost"), [("builtin:photos", "top1"), ("oxford-iiit-pet", "top1"), ("oxford-iiit-pet", "top1_macro")])
def test_an_evaluation_with_one_of_its_lines_is_refused(store: RowStore, dataset: str, lost: str) -> None:
    plant(store, answers(0.8), dataset=dataset)
    lines = store.file.read_text().splitlines(keepends=True)
    store.file.write_text("".join(line for line in lines if json.loads(line)["metric"] != lost))
    with pytest.raises(
        Failure, match=rf"toy-cls-s0 read with cls on {dataset} by knn has no line with {lost}: evaluate it again; both lines"
    ):
        build([store.folder])


def test_a_value_that_is_not_that_of_its_predictions_is_refused(store: RowStore) -> None:
    plant(store, answers(0.8))
    plant(store, torch.stack([answers(0.7, seed=seed) for seed in range(3)], dim=1), read_with="gap", protocol="lowshot-5")
    build([store.folder])
    for metric in ("top1", "top1_macro"):
        lines = [json.loads(line) for line in store.file.read_text().splitlines()]
        for line in lines:
            line["value"] = line["value"] + 0.05 * (line["metric"] == metric and line["read_with"] == "gap")
        edited = RowStore(store.folder.parent / metric)
        shutil.copytree(store.folder, edited.folder)
        edited.file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        with pytest.raises(Failure, match=rf"toy-cls-s0 read with gap .*: the row says {metric} .*{metric}.predictions.*parquet"):
            build([edited.folder])


def test_cells_below_raw_pixels_are_marked_by_their_own_protocol(store: RowStore) -> None:
    pixels = {"method": "pixels", "trained_with": None, "read_with": "pixels", "source": "pixels:32", "checkpoint": "pixels", "init": None}
    plant(store, torch.arange(400) < 306, transform="resize32-own", **pixels)
    plant(store, torch.arange(400) < 200, transform="resize8", **pixels)  # of two sizes the better one is the floor
    plant(store, torch.arange(400) < 307)
    plant(store, torch.arange(400) < 305, read_with="gap")
    plant(store, torch.arange(400) < 200, read_with="gap", protocol="logreg")  # pixels were not judged by it
    plant(store, torch.arange(400) < 200, read_with="gap", control="shuffled labels")
    plant_random(store, torch.arange(400) < 100)
    comparison = build([store.folder])
    below = {(arm, spec) for table in comparison.tables for (arm, spec), cell in table.cells.items() if cell.below_pixels}
    assert below == {(DINO_CLS, "gap"), (DINO_CLS._replace(trained_with=None), "cls")}

    # all of them but the random start are warned of, and no training is asked for
    plant(store, torch.arange(400) < 150, method="timm", trained_with=None, source="timm:vit", init=None, recipe=None, seed=None)
    text = " ".join(screen(build([store.folder])).split())
    assert text.startswith(
        "warning: builtin:photos, knn v1: 2 of 2 scores of other readouts and models are below raw pixels (76.5 %): "
        "dino (toy), trained with cls read with gap; timm (timm:vit) read with cls; these features tell less"
    )
    assert "Train longer" not in text


def test_the_metric_is_known_by_whole_words_of_the_name_unless_it_is_declared(store: RowStore) -> None:
    def judged_by(*names: str, **declared: str) -> set[str]:
        return {metric_of(row) for name in names for row in plant(store, [1, 0, 1], dataset=name, **declared)}

    by_class = [
        "OxfordIIITPet",
        "timm/oxford-iiit-pet",
        "pets",
        "oxfordiiitpet",
        "nelorth/oxford-flowers",
        "Flowers102",
        "oxford_flowers102",
    ]
    by_class += ["FLOWERS", "FGVCAircraft", "torchvision:FGVC-Aircraft", "fgvc_aircraft", "Caltech101", "caltech_101"]
    assert judged_by(*by_class) == {"top1_macro"}
    others = ["my_carpets", "sunflowers", "trumpets", "Sunflowers2", "builtin:photos", "IIIT5K", "my_pet", "aircrafts", "cifar100"]
    assert judged_by(*others) == {"top1"}
    assert judged_by(*others, dataset_metric="top1_macro") == {"top1_macro"}
    assert judged_by(*by_class, dataset_metric="top1") == {"top1"}


def test_one_declaration_goes_for_all_rows_of_a_dataset(store: RowStore) -> None:
    plant(store, answers(0.75))
    plant(store, answers(0.5), read_with="gap", dataset_metric="top1_macro")
    comparison = build([store.folder])
    (table,) = comparison.tables
    assert (table.metric, len(table.cells)) == ("top1_macro", 2)
    assert {family.metric for family in comparison.families} == {"top1_macro"}
    assert not any("declared" in note for note in notes(comparison))
    plant(store, answers(0.75), read_with="register", dataset_metric="top1")
    comparison = build([store.folder])
    assert [table.metric for table in comparison.tables] == ["top1"]
    assert "builtin:photos: the metrics top1_macro and top1 are declared for it; top1 counts, the last" in notes(comparison)


def test_a_data_set_is_judged_by_its_own_metric(store: RowStore) -> None:
    labels = torch.cat([torch.zeros(300), torch.ones(60), torch.full((40,), 2)]).long()
    start, gap = torch.arange(400) % 2 == 0, torch.arange(400) < 330  # gap answers the large class
    for dataset, declared in (("oxford-iiit-pet", None), ("pictures", None), ("counts", "top1_macro")):
        own = {"dataset": dataset, "data": dataset, "dataset_metric": declared}
        plant(store, answers(0.75), labels, **own)
        plant(store, gap, labels, read_with="gap", **own)
        plant_random(store, start, labels=labels, **own)
    comparison = build([store.folder])
    pets, pictures, counts = comparison.tables
    assert (pets.metric, pictures.metric, counts.metric, pets.classes) == ("top1_macro", "top1", "top1_macro", 3)
    for table in (pets, pictures, counts):
        weights = torch.full((400,), 1 / 400) if table is pictures else 1 / 3 / torch.bincount(labels)[labels]
        cell = table.cells[DINO_CLS, "cls"]
        assert cell.value == pytest.approx((answers(0.75) * weights).sum().item(), rel=1e-5)
        # not what the row says, which is planted as 0 to 1 for the mean over classes
        assert cell.ci == accuracy_interval(answers(0.75)[:, None], None if table is pictures else labels)
        assert cell.gain is not None
        assert cell.gain.points == pytest.approx(100 * ((answers(0.75).double() - start.double()) * weights).sum().item(), rel=1e-4)
    metrics = {("oxford-iiit-pet", "macro top-1"), ("pictures", "top-1"), ("counts", "macro top-1")}
    for sheet in (scores(comparison), differences("d", "D", comparison.families, comparison.rule)):
        assert set(zip(sheet.frame["dataset"], sheet.frame["metric"], strict=True)) == metrics
    assert [listing.sheet.title.split(" (")[0] for listing in tables(comparison, "trained-with")] == [
        "oxford-iiit-pet · knn: macro top-1, %",
        "pictures · knn: top-1, %",
        "counts · knn: macro top-1, %",
    ]
    for family in families(comparison, "read with"):
        (found,) = family.differences
        assert (found.points > 0) == (family.setting.dataset == "pictures")
        assert found.low < found.points < found.high


def test_controls_stand_with_what_they_control(store: RowStore) -> None:
    plant(store, answers(0.8))
    plant(store, answers(0.7), method="mae", source="patches-cls-s0", init="xavier")
    plant_random(store, answers(0.6))
    plant_random(store, answers(0.5), start="xavier", source="random:patches")
    plant_random(store, answers(0.4), start="unused", source="random:unused")
    plant(store, answers(0.3), method="pixels", trained_with=None, read_with="pixels", source="pixels:32", checkpoint="pixels", init=None)
    plant(store, answers(0.9), method="timm", trained_with=None, source="timm:vit", init=None, recipe=None, seed=None)
    comparison = build([store.folder])
    (table,) = comparison.tables
    random = table.cells[DINO_CLS._replace(trained_with=None), "cls"]
    assert random.ci == pytest.approx((random.value - 0.05, random.value + 0.05), abs=0.01)
    assert table.cells[Arm("mae", "patches", None), "cls"].value < random.value
    assert comparison.others(table) == [Arm("random", "random:unused", None), Arm("timm", "timm:vit", None)]
    assert comparison.read_with == ["cls"]
    text = screen(comparison)
    assert text.index("patches random") < text.index("pixels:32") < text.index("timm:vit")


def test_a_table_of_controls_alone_has_no_empty_lines(store: RowStore) -> None:
    plant(store, answers(0.8))
    plant(store, answers(0.3), method="timm", trained_with=None, source="timm:vit", init=None, transform="resize224")
    comparison = build([store.folder])
    alone = next(table for table in comparison.tables if table.setting.transform == "resize224")
    assert comparison.trained(alone) == []


def test_an_interval_that_includes_zero_is_said(store: RowStore) -> None:
    plant(store, answers(0.7))
    plant_random(store, answers(0.7, seed=3))
    cell = build([store.folder]).tables[0].cells[DINO_CLS, "cls"]
    assert score_text(cell) == "71.0"
    assert under_text(cell).startswith("−2.0 [")
    assert under_text(cell).endswith(" ○")


def test_one_screen_has_the_tables_then_the_verdicts_then_what_to_do(store: RowStore) -> None:
    for readout, count in (("cls", 300), ("gap", 200)):
        plant_arm(store, readout, range(6), lambda seed, count=count: torch.arange(400) < count)
    text = screen(build([store.folder]))
    assert "\n\nTop-1 in %; ±: standard deviation over seeds; *: read as trained.\n\n" in text  # of what is there alone
    parts = ["75.0 ± 0.0*", "verdicts, at a margin of 1 point\n", "Which readout to train with (B): 1 better"]
    parts += ["dino (toy), builtin:photos, knn v1: cls > gap +25.0 [", "next: See whether", "--verbose", "Warnings there: 1."]
    assert [text.index(part) for part in parts] == sorted(text.index(part) for part in parts)


def test_what_raw_pixels_beat_is_marked_and_warned_of_first(store: RowStore) -> None:
    plant(store, answers(0.8))
    plant(store, answers(0.9), trained_with="gap", read_with="gap", source="toy-gap-s0")
    plant(
        store, answers(0.85, seed=1), method="pixels", read_with="pixels", source="pixels:32", checkpoint="p", trained_with=None, init=None
    )
    text = screen(build([store.folder]))
    warning, _, text = text.partition("\n\n")
    said = " ".join(warning.split())
    assert said.startswith("warning: builtin:photos, knn v1: 1 of 2 trained backbones, read as trained, are below raw pixels (")
    assert said.endswith(": dino (toy), trained with cls; what is compared there has not learnt to see")
    assert [line.split()[1] for line in text.splitlines() if "*▽" in line] == ["cls"]
    assert "next: Train longer" in text


@pytest.mark.parametrize(
    ("gain", "text"),
    [
        (Gain(6.11, 4.4, 7.75, 1), "+6.1 [4.4, 7.8]"),
        (Gain(-6.11, -8.0, -4.4, 1), "−6.1 [−8.0, −4.4]"),
        (Gain(0.01, -0.02, 1.5, 1), "0.0 [0.0, 1.5] ○"),
        (Gain(2.0, 0.04, 4.0, 1), "+2.0 [0.0, 4.0] ○"),  # as shown, it includes zero
        (Gain(6.0, 5.0, 7.0, 3), "+6.0 (5.0 … 7.0)"),
    ],
)
def test_gain_text(gain: Gain, text: str) -> None:
    assert gain_text(gain) == text


def test_compare_prints_the_table_and_ends_with_the_path(store: RowStore, capsys: pytest.CaptureFixture[str]) -> None:
    plant(store, answers(0.8))
    plant_random(store, answers(0.6))
    path = compare([store.folder])
    assert path == store.folder / "report.html"
    output = capsys.readouterr().out
    assert screen(build([store.folder])) in output
    assert "The rule." not in output
    assert output.splitlines()[-1] == f"report: {path}"
    assert compare([store.folder], store.folder / "new" / "folder").is_file()
    path.write_text(path.read_text().replace("Which token", "Old"))
    compare([store.folder], verbose=True)
    assert "Which token" in path.read_text()  # our own report is replaced
    output = capsys.readouterr().out
    for part in ("What to conclude.", "The rule.", "builtin:photos · knn: top-1, %", "Protocols and what they selected", f"report: {path}"):
        assert part in output
    there = {p.name for p in store.folder.iterdir() if not p.name.startswith(".")}
    assert there == {"predictions", "rows.jsonl", "rows.lock", "new", "plots", "report.html", "report.md", "tables"}


def test_compare_overwrites_nothing_else(store: RowStore, tmp_path: Path) -> None:
    plant(store, answers(0.8))
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(UsageError, match="is a file: name a folder"):
        compare([store.folder], file)
    (tmp_path / "report.html").write_text("mine")
    with pytest.raises(UsageError, match="not written by ssl-vit compare"):
        compare([store.folder], tmp_path)
    assert (tmp_path / "report.html").read_text() == "mine"
    with pytest.raises(UsageError, match="no folder"):
        compare([])


def test_predictions_that_do_not_fit_their_row_are_refused(store: RowStore) -> None:
    plant(store, answers(0.8), n_test=399)
    plant_random(store, answers(0.6))
    with pytest.raises(Failure, match="400 predictions, its row 399 images"):
        build([store.folder])


def test_runs(tmp_path: Path) -> None:
    finished, killed = tmp_path / "toy-cls+gap-s1", tmp_path / "cells" / "toy-cls.gap-s1"
    for folder in (finished, killed):
        folder.mkdir(parents=True)
        (folder / "recipe.yaml").write_text(yaml.safe_dump({"method": "dino", "readout": "cls+gap", "seed": 1}))
    (finished / "run.json").write_text(json.dumps({"steps": 3}))
    (killed / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "lo')
    unfinished, done = find_runs([tmp_path, tmp_path / "cells"], {})
    # of one recipe: one name, and the cells of a study have it without the readout and the seed
    assert (done.name, done.summary, done.metrics) == ("toy", {"steps": 3}, [])
    assert (unfinished.name, unfinished.summary, unfinished.metrics) == ("toy", None, [{"step": 1, "loss": 2.5}])
    assert short_name("random:toy", None, 1) == "random:toy"
    for damaged in ("run.json", "recipe.yaml"):
        for content in ("{", "", "3\n", "[]\n"):
            whole = (finished / damaged).read_text()
            (finished / damaged).write_text(content)
            with pytest.raises(Failure, match=f"cannot read .*{damaged}"):
                find_runs([tmp_path], {})
            (finished / damaged).write_text(whole)
