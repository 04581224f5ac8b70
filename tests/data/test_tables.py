"""Parquet, Arrow and saved tables of images, streamed as the files they were made of; Arrow is read where it is."""

import pickle
import shutil
import signal
from pathlib import Path

import datasets
import pyarrow as pa
import pytest

from ssl_vit.data.sources import open_records
from ssl_vit.errors import Failure
from ssl_vit.train.callbacks import RunFolder
from tests.data.test_stream import equal_weights, jpegs, pretrain

__all__ = ["jpegs"]
pytestmark = [pytest.mark.usefixtures("jpegs", "own_cache"), pytest.mark.filterwarnings("ignore:This DataLoader will create")]

PARTS = 2


def write_tables() -> None:
    """`parquet`, `arrow` and `saved`: the JPEGs in the order of their names, in two parts."""
    encoded = [{"bytes": file.read_bytes(), "path": None} for file in sorted(Path("jpegs").iterdir())]
    table = datasets.Dataset.from_dict({"image": encoded}, datasets.Features({"image": datasets.Image()}))
    table.save_to_disk("saved", num_shards=PARTS)
    for kind in ("parquet", "arrow"):
        Path(kind).mkdir()
    for part in range(PARTS):
        name = f"train-{part:05}-of-{PARTS:05}"
        table.shard(PARTS, part, contiguous=True).to_parquet(f"parquet/{name}.parquet")
        shutil.copy(f"saved/data-{part:05}-of-{PARTS:05}.arrow", f"arrow/{name}.arrow")


def copied() -> int:
    """Bytes in the cache of `datasets`."""
    return sum(file.stat().st_size for file in Path(datasets.config.HF_DATASETS_CACHE).rglob("*"))


def test_tables_stream_as_the_files_they_were_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    write_tables()
    options = ("mae.yaml", "--trainer.max_steps", "5", "--data.decode", "stream")  # 3 steps an epoch
    assert pretrain(*options, "--out", "files") == 0
    original = RunFolder.on_train_batch_end

    def interrupted(self: RunFolder, trainer: object, *args: object) -> None:
        self.signals.received = signal.SIGINT * (trainer.global_step == 2)  # type: ignore[attr-defined]
        original(self, trainer, *args)  # type: ignore[arg-type]

    for kind, workers, then in (("parquet", "2", "0"), ("arrow", "0", "2"), ("arrow", "2", "0"), ("saved", "2", "0")):
        run = ("--data.source", f"./{kind}", "--out", f"{kind}{workers}", "--data.workers")
        with monkeypatch.context() as patch:
            patch.setattr(RunFolder, "on_train_batch_end", interrupted)
            assert pretrain(*options, *run, workers) == 130
        assert pretrain(*options, *run, then, "--resume") == 0
        assert equal_weights("files", f"{kind}{workers}")


def test_arrow_files_are_mapped_where_they_are() -> None:
    write_tables()
    before = sorted(Path("arrow").iterdir())
    for _ in range(2):
        records = open_records("./arrow", "train")
        assert len(records.encoded_rows(range(60))) == 60
        assert len(pickle.dumps(records)) < 20_000  # what a worker is sent
    assert copied() < 20_000
    assert sorted(Path("arrow").iterdir()) == before
    open_records("./parquet", "train")
    assert copied() > sum(file.stat().st_size for file in before) / 2  # of what is converted there is a copy


@pytest.mark.parametrize("types", [(pa.binary(), pa.binary()), (pa.binary(), pa.large_binary())])
def test_arrow_files_that_cannot_be_mapped_are_converted(types: tuple[pa.DataType, pa.DataType]) -> None:
    """The IPC file format, and files of different types."""
    Path("odd").mkdir()
    new = pa.ipc.new_file if types[0] == types[1] else pa.ipc.new_stream
    for name, kind in zip("ab", types, strict=True):
        table = pa.table({"image": pa.array([name.encode()] * 3, kind)})
        with new(f"odd/{name}.arrow", table.schema) as file:
            file.write_table(table)
    records = open_records("./odd", "train")
    assert [data for _, data in records.encoded_rows(range(6))] == [b"a"] * 3 + [b"b"] * 3


@pytest.mark.parametrize("damage", ["cut short", "an offset", "not arrow", "empty"])
def test_a_damaged_arrow_file_is_one_line(damage: str) -> None:
    table = pa.table({"image": pa.array([b"x" * 1000] * 50)})
    with pa.ipc.new_stream("train.arrow", table.schema) as file:
        file.write_table(table)
    whole = Path("train.arrow").read_bytes()
    far = whole.replace((10_000).to_bytes(4, "little"), (2**31 - 1).to_bytes(4, "little"))
    content = {"cut short": whole[:20_000], "an offset": far, "not arrow": b"<html>" * 50, "empty": b""}[damage]
    Path("train.arrow").write_bytes(content)
    with pytest.raises(Failure, match=r"train\.arrow \(split 'train'\) cannot be read as arrow: [^\n]+$"):
        open_records("./train.arrow", "train")
