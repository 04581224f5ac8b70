"""Files of somebody else are read as data: what they would have executed is not, on every way to a loader, and no URL is opened."""

import http.server
import json
import os
import pickle
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ssl_vit.cli import run
from ssl_vit.weights.checkpoint import load_backbone
from tests.conftest import errors

WAYS = {
    "eval": ["eval", "evil.ckpt", "--data", "./pictures"],
    "eval of a student": ["eval", "evil.ckpt:student", "--data", "./pictures"],
    "eval of an exported folder": ["eval", "exported", "--data", "./pictures"],
    "init": ["pretrain", "mae.yaml", "--init", "evil.ckpt"],
    "resume": ["pretrain", "mae.yaml", "--out", "run", "--resume"],
    "resume auto": ["pretrain", "mae.yaml", "--out", "run", "--resume", "auto"],
    "export": ["export", "evil.ckpt", "--out", "new"],
}


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch executed",))


def evil(content: dict[str, Any], path: str, raw: bool) -> None:
    """`content` with a payload beside its weights, as torch.save or as pickle writes it."""
    content = {**content, "state_dict": {**content["state_dict"], "payload": Payload()}}
    if raw:
        Path(path).write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)


@pytest.fixture
def run_folder(three_classes: None, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """`run/`, stopped after two of three steps, and what its checkpoint holds."""
    assert run(["pretrain", "mae.yaml", "--out", "run", "--trainer.accelerator", "cpu", "--trainer.max_steps", "2"]) == 0
    Path("run/run.json").unlink()
    capsys.readouterr()
    return dict(torch.load("run/last.ckpt", weights_only=True))


@pytest.mark.parametrize("raw", [False, True])
def test_a_payload_is_executed_nowhere(raw: bool, run_folder: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["export", "run/last.ckpt", "--out", "exported"]) == 0
    for path in ("evil.ckpt", "exported/model.safetensors", *map(str, Path("run").glob("*.ckpt"))):
        evil(run_folder, path, raw)
    kept = {path: path.read_bytes() for path in Path("run").iterdir() if path.is_file()}
    for way, command in WAYS.items():
        assert run(command) != 0, way
        assert len(errors(capsys)) == 1, way
        assert not Path("executed").exists(), way
        assert all(path.read_bytes() == content for path, content in kept.items()), way
    # the file is one that would execute
    (pickle.loads if raw else lambda data: torch.load("evil.ckpt", weights_only=False))(Path("evil.ckpt").read_bytes())
    assert Path("executed").exists()


def test_lightning_executes_nothing_either(run_folder: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads the file once more; of several nodes, each its own."""
    evil(run_folder, "run/last.ckpt", raw=False)
    monkeypatch.setattr("ssl_vit.train.pretrain.prepare_folder", lambda *_: None)
    assert run(["pretrain", "mae.yaml", "--out", "run", "--resume", "--trainer.accelerator", "cpu"]) == 1
    assert not Path("executed").exists()


def test_a_yaml_file_executes_nothing(run_folder: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    tag = '!!python/object/apply:os.system ["touch executed"]'
    evaluate = ["eval", "pixels:16", "--data", "./pictures", "--out", "out", "--protocols"]
    assert run([*evaluate, "knn"]) == 0
    for path in ("evil.yaml", "run/recipe.yaml"):
        Path(path).write_text(f"method: mae\nseed: {tag}\n")
    ways = (["pretrain", "evil.yaml"], ["pretrain", "mae.yaml", "--out", "run", "--resume"], ["study", "evil.yaml"])
    for command in (*ways, [*evaluate, "evil.yaml"], ["eval", "pixels:16", "--suite", "evil.yaml"], ["compare", "out", "run"]):
        run(command)
        assert not Path("executed").exists(), command
    yaml.unsafe_load(Path("evil.yaml").read_text())  # the file is one that would execute
    assert Path("executed").exists()


def test_no_url_is_opened(run_folder: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None:
            asked.append(self.path)

    shutil.copy("run/last.ckpt", "good.ckpt")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/good.ckpt"
        for command in (["eval", url, "--data", "./pictures"], ["export", url, "--out", "new"], ["pretrain", "mae.yaml", "--init", url]):
            assert run(command) == 2
            assert "there is no checkpoint http" in errors(capsys)[0]
        server.shutdown()
    assert not asked


def test_an_exported_folder_names_no_code(run_folder: dict[str, Any]) -> None:
    """The architecture in config.json is built by our own names: timm's entry points and class paths in it mean nothing."""
    assert run(["export", "run/last.ckpt", "--out", "exported"]) == 0
    config = json.loads(Path("exported/config.json").read_text())
    expected = load_backbone("exported").weights_hash()
    Path("exported/config.json").write_text(json.dumps({**config, "architecture": "os.system", "auto_map": {"AutoModel": "evil.Model"}}))
    assert load_backbone("exported").weights_hash() == expected
