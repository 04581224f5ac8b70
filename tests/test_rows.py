"""Rows and predictions on disk: what is written comes back, a kill costs at most the last line, and bad lines are named."""

import errno
import io
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter

import ssl_vit_eval.rows
from ssl_vit.errors import Failure, UsageError
from ssl_vit_eval.results import sentence
from ssl_vit_eval.rows import FORMAT, Row, RowStore, find_rows
from tests.planted import plant

PREDICTIONS, LABELS = torch.tensor([1, 0, 2]), torch.tensor([1, 1, 2])


def row(**changes: object) -> Row:
    values: dict[str, object] = {
        "method": "dino",
        "trained_with": "cls",
        "read_with": "gap",
        "dataset": "builtin:photos",
        "protocol": "logreg",
        "protocol_version": 1,
        "protocol_hash": "pp",
        "metric": "top1",
        "value": 2 / 3,
        "ci_low": 0.2,
        "ci_high": 0.9,
        "n_train": 90,
        "n_test": 3,
        "seed": 0,
        "selected": {"C": 0.1},
        "grid": {"C": [0.01, 0.1]},
        "edge_of_grid": True,
        "oracle": 0.7,
        "deviations": ["k is capped"],
        "seconds": 1.5,
        "checkpoint": "aa",
        "recipe": "bb",
        "family": "ff",
        "init": None,
        "data": "cc",
        "transform": "dd",
        "git": None,
        "source": "last.ckpt",
    }
    return Row(**{**values, **changes})


def test_rows_and_predictions_come_back(tmp_path: Path) -> None:
    store = RowStore(tmp_path / "eval")
    assert store.rows() == []
    written = store.append([row(), row(metric="macro", value=0.5)], PREDICTIONS, LABELS)
    assert store.rows() == written
    assert [replace(r, predictions="", predictions_hash=None) for r in written] == [row(), row(metric="macro", value=0.5)]
    assert written[0].predictions == written[1].predictions
    predictions, labels = store.predictions(written[0])
    assert predictions.tolist() == [[1], [0], [2]]
    assert labels.tolist() == [1, 1, 2]
    line = json.loads(store.file.read_text().splitlines()[0])
    assert line == {"format": FORMAT, "id": written[0].id, **asdict(written[0])}
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == sorted(
        [Path(written[0].predictions).name, "rows.jsonl", "rows.lock"]
    )


def test_only_new_lines_are_parsed_and_a_changed_file_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, other, parsed, parse = RowStore(tmp_path), RowStore(tmp_path), list[str](), ssl_vit_eval.rows._parse
    monkeypatch.setattr(ssl_vit_eval.rows, "_parse", lambda line, where: parsed.append(where) or parse(line, where))
    for data in ("one", "two", "three"):  # by another process
        other.append([row(data=data)], PREDICTIONS, LABELS)
        assert store.rows()[-1].data == data
    assert [where.rpartition(" ")[2] for where in parsed] == ["1", "2", "3"]
    first, second, third = store.file.read_text().splitlines(keepends=True)
    store.file.write_text(first + third)
    assert [one.data for one in store.rows()] == ["one", "three"]
    store.file.write_text(first + second.replace('"two"', '"2"') + third)
    assert [one.data for one in store.rows()] == ["one", "2", "three"]


def test_a_line_that_is_completed_while_it_is_read_waits_for_the_next_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = RowStore(tmp_path)
    store.append([row()], PREDICTIONS, LABELS)
    line, half = store.file.read_bytes(), 100
    store.file.write_bytes(line + line[:half])

    class Written(io.FileIO):
        def __iter__(self) -> Iterator[bytes]:
            for part in iter(self.readline, b""):
                if not part.endswith(b"\n"):  # the other process goes on
                    with open(self.name, "ab") as file:
                        file.write(line[half:])
                yield part

    monkeypatch.setattr(ssl_vit_eval.rows, "open", lambda path, mode: Written(path, mode), raising=False)
    assert len(store.measured()) == 1
    monkeypatch.undo()
    assert len(store.measured()) == 2


def test_a_metric_declared_later_is_added_to_the_rows_of_the_data(tmp_path: Path) -> None:
    store = RowStore(tmp_path)
    store.append([row()], PREDICTIONS, LABELS)
    store.append([row(data="other")], PREDICTIONS, LABELS)
    known = store.known(row().data)
    for _ in range(2):  # the second time there is nothing to add
        store.declare(row().data, "top1_macro")
    assert [(one.data, one.dataset_metric) for one in store.rows()] == [(row().data, "top1_macro"), ("other", None)]
    assert len(store.measured()) == 3
    assert store.known(row().data) == known


def test_what_is_there_is_known(tmp_path: Path) -> None:
    store = RowStore(tmp_path)
    assert store.known(row().data) == set()
    (written,) = store.append([row()], PREDICTIONS, LABELS)
    assert store.known(row().data) == {(row(value=0.1, seconds=9.0).key, "top1")}
    for name in ("checkpoint", "data", "transform", "protocol", "protocol_hash", "read_with", "control"):
        assert row(**{name: "other"}).key != row().key
    assert row(protocol_version=2).key != row().key
    assert store.known("other data") == set()
    (tmp_path / written.predictions).unlink()
    assert store.known(row().data) == set()


def test_rows_are_checked_by_one_schema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Building it takes milliseconds, which each of many thousand rows would take again."""
    built: list[object] = []
    original = TypeAdapter.__init__

    def counted(self: TypeAdapter[object], kind: type, **options: int) -> None:
        built.append(kind)
        original(self, kind, **options)

    monkeypatch.setattr(TypeAdapter, "__init__", counted)
    store = RowStore(tmp_path)
    for number in range(5):
        store.append([row(checkpoint=f"c{number}")], PREDICTIONS, LABELS)
    assert len(store.rows()) == 5
    assert built.count(Row) <= 1


def test_the_last_of_equal_ids_wins(tmp_path: Path) -> None:
    store = RowStore(tmp_path)
    store.append([row(value=0.1)], PREDICTIONS, LABELS)
    store.append([row(read_with="cls")], PREDICTIONS, LABELS)
    store.append([row(value=0.2)], LABELS, LABELS)
    assert sorted((r.read_with, r.value) for r in store.rows()) == [("cls", 2 / 3), ("gap", 0.2)]
    assert store.predictions(row(predictions=store.rows()[0].predictions))[0][:, 0].tolist() == LABELS.tolist()


@pytest.mark.parametrize("tail", [7, 4096])
def test_a_kill_at_any_byte_costs_the_last_line_only(tail: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssl_vit_eval.rows, "_TAIL", tail)
    store = RowStore(tmp_path)
    store.append([row()], PREDICTIONS, LABELS)
    first = len(store.file.read_bytes())
    store.append([row(read_with="cls")], PREDICTIONS, LABELS)
    whole = store.file.read_bytes()
    for size in (first, first + 1, first + 100, len(whole) - 1):
        store.file.write_bytes(whole[:size])
        assert [r.read_with for r in store.rows()] == ["gap"]
        assert ("last line was cut short" in store.cut_line()) == (size > first)
        store.append([row(read_with="cls")], PREDICTIONS, LABELS)
        assert store.cut_line() == ""
        assert store.file.read_bytes() == whole
    store.file.write_bytes(whole[: first // 2])
    store.append([row(read_with="cls")], PREDICTIONS, LABELS)
    assert [r.read_with for r in store.rows()] == ["cls"]


def test_a_failed_write_of_predictions_leaves_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    store = RowStore(tmp_path)
    store.append([row(value=0.1)], PREDICTIONS, LABELS)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        store.append([row(value=0.2)], LABELS, LABELS)
    assert [r.value for r in store.rows()] == [0.1]
    assert store.predictions(store.rows()[0])[0][:, 0].tolist() == PREDICTIONS.tolist()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("<html>", "line 2 is not a row"),
        ("[1, 2]", "line 2 is not a row"),
        ('{"loss": 1.0}', "line 2 is not a row"),
        ('{"format": 3, "id": "x", "shape": "unknown"}', "line 2 has row format 3, this version of ssl_vit reads 1 to 2"),
        ('{"format": 1, "id": "x", "method": "dino"}', "line 2 is not a row .*lacks the key"),
    ],
)
def test_a_line_that_is_no_row_is_named(tmp_path: Path, line: str, message: str) -> None:
    store = RowStore(tmp_path)
    store.append([row()], PREDICTIONS, LABELS)
    store.file.write_text(store.file.read_text() + line + "\n")
    with pytest.raises(Failure, match=message):
        store.rows()


def test_a_field_of_the_wrong_type_is_named(tmp_path: Path) -> None:
    store = RowStore(tmp_path)
    store.append([row()], PREDICTIONS, LABELS)
    store.file.write_text(store.file.read_text().replace('"n_test": 3', '"n_test": "three"'))
    with pytest.raises(Failure, match="line 1 is not a row"):
        store.rows()


def bit_flipped(data: bytes) -> bytes:
    return data[: len(data) // 3] + bytes([data[len(data) // 3] ^ 1]) + data[len(data) // 3 + 1 :]


@pytest.mark.parametrize("damage", [lambda data: b"PAR1 cut", lambda data: data[:-9], bit_flipped, lambda data: b"", "gone", "another's"])
def test_damaged_predictions_are_named_and_evaluated_again(damage: Callable[[bytes], bytes] | str, tmp_path: Path) -> None:
    store = RowStore(tmp_path)
    (written,) = store.append([row()], PREDICTIONS, LABELS)
    file = tmp_path / written.predictions
    if callable(damage):
        file.write_bytes(damage(file.read_bytes()))
    elif damage == "gone":
        file.unlink()
    else:  # another row's file under this name, with as many right answers
        (other,) = store.append([row(read_with="cls")], PREDICTIONS.flip(0), LABELS)
        file.write_bytes((tmp_path / other.predictions).read_bytes())
    assert (written.key, written.metric) not in store.known(written.data)
    with pytest.raises(Failure, match="cannot read the predictions"):
        store.predictions(written)
    store.append([row()], PREDICTIONS, LABELS)
    assert (written.key, written.metric) in store.known(written.data)


def test_rows_of_format_1_are_read_and_kept(tmp_path: Path) -> None:
    """They say no hash of their predictions."""
    store = RowStore(tmp_path)
    (written,) = store.append([row()], PREDICTIONS, LABELS)
    line = json.loads(store.file.read_text())
    del line["predictions_hash"]
    store.file.write_text(json.dumps({**line, "format": 1}) + "\n")
    assert store.rows() == [replace(written, predictions_hash=None)]
    assert store.known(written.data) == {(written.key, "top1")}
    assert store.predictions(store.rows()[0])[0].tolist() == [[1], [0], [2]]


def test_rows_of_two_evaluations_are_not_mixed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="exactly one evaluation"):
        RowStore(tmp_path).append([row(), row(read_with="cls")], PREDICTIONS, LABELS)


def test_rows_are_found_below_the_folders_once(tmp_path: Path) -> None:
    RowStore(tmp_path / "a" / "deep").append([row(value=0.1)], PREDICTIONS, LABELS)
    RowStore(tmp_path / "b").append([row(value=0.2)], LABELS, LABELS)
    RowStore(tmp_path / "b").append([row(read_with="cls")], PREDICTIONS, LABELS)
    found = find_rows([tmp_path / "a", str(tmp_path / "b"), tmp_path / "b", tmp_path])
    assert [(r.read_with, r.value) for r, _ in found] == [("gap", 0.1), ("gap", 0.2), ("cls", 2 / 3)]
    for r, store in found:
        assert store.predictions(r)[0][:, 0].tolist() == (LABELS if r.value == 0.2 else PREDICTIONS).tolist()


def test_folders_without_rows_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"holds no rows .*--out .*/empty` first"):
        find_rows([tmp_path / "empty"])
    run = tmp_path / "run"  # where eval refuses to write
    run.mkdir()
    for name in ("recipe.yaml", "last.ckpt"):
        (run / name).touch()
    with pytest.raises(UsageError, match=r"run `ssl-vit eval .*/run/last.ckpt --out runs/eval` first, then compare runs/eval"):
        find_rows([run])
    RowStore(tmp_path / "rows").append([row()], PREDICTIONS, LABELS)
    assert len(find_rows([run, tmp_path / "rows"])) == 1
    with pytest.raises(UsageError, match="there is no folder"):
        find_rows([tmp_path / "nowhere"])


def test_the_line_of_an_evaluation_names_the_metric_that_its_dataset_declares(tmp_path: Path) -> None:
    labels = torch.tensor([0, 0, 0, 1])
    chosen = {"selected": {"k": 20}, "grid": {"k": [1.0, 20.0]}, "edge_of_grid": False}
    for declared, said in ((None, "top-1 75.0 % ["), ("top1_macro", "macro top-1 50.0 % [")):
        line = sentence(plant(RowStore(tmp_path), [1, 1, 1, 0], labels, dataset_metric=declared, **chosen))
        assert line.startswith(f"toy-cls-s0 read with cls, builtin:photos, knn: {said}")
        assert line.endswith("(k 20)")
