"""Several real processes over gloo: every index once and in order, and the numbers of one process to the last bit."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.multiprocessing import start_processes

from ssl_vit.data.images import ImageStore
from ssl_vit.errors import Failure
from ssl_vit.model.backbone import build_backbone
from ssl_vit.model.config import BackboneConfig
from ssl_vit.model.readout import readout
from ssl_vit_eval import distributed
from ssl_vit_eval.distributed import barrier, gather_objects, merge_parts, parts, process_group, rank, world
from ssl_vit_eval.features.tokens import TokenReader, open_tokens
from ssl_vit_eval.probes import online_knn
from ssl_vit_eval.sources import Source
from tests.processes import THREADS, free_port

TOTALS, SIZES = (0, 1, 5, 7, 64, 65), (1, 3, 64)
WORLDS = (3, 2)
BATCHES = (7, 256)  # of the k-NN: ranges that do not divide, and a single one, so that some processes have none


def work(pictures: Path) -> dict[str, object]:
    """What every process answers, and what it did itself (`own`)."""
    torch.set_num_threads(THREADS)
    merged, own = {}, {}
    for total in TOTALS:
        for size in SIZES:
            mine = [torch.arange(start, end) for start, end in parts(total, size)]
            indices = torch.cat([torch.arange(0), *mine])
            own[f"{total}/{size}"] = indices.tolist()
            columns = torch.stack([indices, indices**2], dim=1).double()
            merged[f"{total}/{size}"] = merge_parts(columns, total, size).tolist()
    torch.manual_seed(0)
    backbone = build_backbone(BackboneConfig("vit_tiny_patch16_224", image_size=16, patch=4, width=24, depth=2, heads=2)).eval()
    callback, accuracy = online_knn.OnlineKNN(str(pictures)), {}
    for batch in BATCHES:
        online_knn.BATCH = batch
        callback.prepare(16)
        accuracy[batch] = callback.measure(backbone, readout("gap"), torch.device("cpu"))
        images = torch.cat([torch.empty(0, 3, 16, 16, dtype=torch.uint8), *callback.bank])
        merged[f"bank/{batch}"] = merge_parts(images, len(callback.bank_labels), batch).flatten(1).long().sum(dim=1).tolist()
        own[f"bank/{batch}"] = len(images)
        with torch.no_grad():
            features = [online_knn._features(part, backbone, readout("gap"), torch.device("cpu")) for part in callback.bank]
        whole = merge_parts(torch.cat([torch.empty(0, 24), *features]), len(callback.bank_labels), batch)
        merged[f"features/{batch}"] = [value.hex() for value in whole.flatten().tolist()]
    barrier()
    return {"merged": merged, "own": own, "accuracy": accuracy, "ranks": gather_objects(rank()), "world": world()}


def member(number: int, pictures: Path, out: Path, ports: list[int]) -> None:
    """The process `number` of each group that has so many."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "RANK": str(number), "LOCAL_RANK": str(number), "CUDA_VISIBLE_DEVICES": ""}
    for processes, port in zip(WORLDS, ports, strict=True):
        os.environ |= {"WORLD_SIZE": str(processes), "MASTER_PORT": str(port)}
        if number < processes:
            with process_group():
                answer = work(pictures)
            (out / f"{number}-of-{processes}.json").write_text(json.dumps(answer))


def one_without_memory(number: int, out: Path, port: int) -> None:
    """One of two processes: the second has no memory for the first tokens of a split."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "RANK": str(number), "LOCAL_RANK": str(number), "CUDA_VISIBLE_DEVICES": ""}
    os.environ |= {"WORLD_SIZE": "2", "MASTER_PORT": str(port)}

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    with process_group():
        backbone = build_backbone(BackboneConfig("vit_tiny_patch16_224", image_size=16, patch=4, width=24, depth=2, heads=2)).eval()
        source = Source("tiny", "random", None, 0, 16, "hash", None, None, None, backbone)
        if number == 1:
            TokenReader.sequences = full  # type: ignore[method-assign, assignment]
        message = ""
        try:
            open_tokens(source, ImageStore.stacked(torch.zeros(2, 3, 16, 16, dtype=torch.uint8)), (-1,), out, "key")
        except Failure as error:
            message = str(error)
        (out / f"{number}.json").write_text(json.dumps(gather_objects(message)))


@pytest.mark.slow
def test_memory_that_runs_out_on_one_process_ends_the_tokens_on_both(tmp_path: Path) -> None:
    start_processes(one_without_memory, (tmp_path, int(free_port())), nprocs=2, start_method="forkserver")
    for number in range(2):
        messages = json.loads((tmp_path / f"{number}.json").read_text())
        assert all(message.startswith("memory ran out (out of memory)") for message in messages)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    patterns = rng.normal(0, 15, (3, 16, 16, 3))
    for number in range(90):
        file = tmp_path / f"pictures/train/{number % 3}/{number:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((128 + patterns[number % 3] + rng.normal(0, 40, (16, 16, 3))).clip(0, 255).astype(np.uint8)).save(file)
    return tmp_path / "pictures"


@pytest.mark.usefixtures("own_cache")
def test_processes_share_the_work_and_agree_with_one(tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ports = [int(free_port()) for _ in WORLDS]
    start_processes(member, (pictures, tmp_path, ports), nprocs=max(WORLDS), start_method="forkserver")
    monkeypatch.setattr(online_knn, "BATCH", online_knn.BATCH)  # `work` changes it
    alone = json.loads(json.dumps(work(pictures)))

    assert alone["world"] == 1
    assert alone["own"]["bank/7"] == 66  # of 90 files a fifth is the test set, and a tenth of the rest is asked
    assert 0 < alone["accuracy"]["7"] < 1
    for total in TOTALS:
        for size in SIZES:
            assert alone["merged"][f"{total}/{size}"] == [[index, index**2] for index in range(total)]
    for processes in WORLDS:
        answers = [json.loads((tmp_path / f"{number}-of-{processes}.json").read_text()) for number in range(processes)]
        for answer in answers:
            assert answer["world"] == processes
            assert answer["ranks"] == list(range(processes))
            assert answer["merged"] == alone["merged"]
            assert answer["accuracy"] == alone["accuracy"]
        for total in TOTALS:
            for size in SIZES:
                own = [answer["own"][f"{total}/{size}"] for answer in answers]
                assert sorted(index for indices in own for index in indices) == list(range(total))
                assert max(map(len, own)) - min(map(len, own)) <= size
        assert sum(answer["own"]["bank/7"] for answer in answers) == 66
        assert [answer["own"]["bank/256"] for answer in answers] == [66] + [0] * (processes - 1)


def test_one_process_needs_no_group() -> None:
    with process_group():
        assert (rank(), world(), list(parts(5, 2))) == (0, 1, [(0, 2), (2, 4), (4, 5)])
        assert not distributed.dist.is_initialized()
