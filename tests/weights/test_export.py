"""`ssl-vit export`: the folder in timm's hands and in ours, against the network that it came from."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.data import resolve_model_data_config

from ssl_vit import load_backbone
from ssl_vit.cli import run
from ssl_vit.data.views import MultiCrop, SingleCrop
from ssl_vit.errors import Failure, UsageError
from ssl_vit.methods.base import Method
from ssl_vit.methods.dino import DINO, HeadConfig
from ssl_vit.methods.mae import MAE, DecoderConfig
from ssl_vit.model.config import BackboneConfig
from ssl_vit.weights.export import export
from ssl_vit_eval.sources import open_source
from tests.conftest import BACKBONE

CONFIG = BackboneConfig(**BACKBONE)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def checkpoint(method: str = "dino", readout: str = "cls", config: BackboneConfig = CONFIG) -> Method:
    """A method with every weight moved from where it starts, and its checkpoint as `run/last.ckpt`."""
    module: Method
    if method == "dino":
        head = HeadConfig(hidden=8, bottleneck=8, prototypes=16)
        module = DINO(readout, config, head, MultiCrop(global_size=16, local_size=8, n_local=1))
    else:
        module = MAE(readout, config, DecoderConfig(width=16, depth=1, heads=2), SingleCrop(size=16))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    content: dict[str, Any] = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(content)
    Path("run").mkdir(exist_ok=True)
    torch.save(content, "run/last.ckpt")
    return module.eval()


@pytest.mark.parametrize("readout", ["cls", "gap", "register", "gap/pre", "gap/pooled", "cls+gap@last2", "ep_cls"])
@torch.no_grad()
def test_timm_loads_the_folder_bit_exactly(readout: str) -> None:
    arm: Any = checkpoint(readout=readout).teacher
    assert run(["export", "run/last.ckpt", "--out", "deep/vit"]) == 0
    assert [path.name for path in Path("deep").iterdir()] == ["vit"]  # nothing beside it is left
    vit = timm.create_model("local-dir:deep/vit", pretrained=True).eval()
    images = torch.randn(3, 3, 16, 16)
    features = vit.forward_features(images)
    assert torch.equal(features, arm.backbone.vit.forward_features(images))
    if readout in ("cls", "gap"):
        torch.testing.assert_close(vit(images), arm.readout(arm.backbone(images)), rtol=0, atol=1e-6)
    else:
        assert torch.equal(vit(images), features)
    larger = torch.randn(1, 3, 24, 24)
    assert torch.equal(vit.forward_features(larger), arm.backbone.vit.forward_features(larger))
    assert timm.create_model("local-dir:deep/vit", pretrained=True, num_classes=5, global_pool="avg", fc_norm=False)(images).shape == (3, 5)
    data = resolve_model_data_config(vit)
    assert [*data["input_size"], *data["mean"], *data["std"], data["crop_pct"]] == [3, 16, 16, *arm.backbone.mean, *arm.backbone.std, 0.875]


@pytest.mark.parametrize(
    "config", [CONFIG, BackboneConfig(**{**BACKBONE, "registers": 0}), BackboneConfig(**{**BACKBONE, "cls_tokens": 0})]
)
@pytest.mark.parametrize("method", ["dino", "mae"])
@torch.no_grad()
def test_the_folder_is_the_checkpoint_to_us(method: str, config: BackboneConfig) -> None:
    checkpoint(method, "gap", config)
    export("run/last.ckpt", "vit")
    images = torch.randn(3, 3, 16, 16)
    ours, exported = load_backbone("run/last.ckpt"), load_backbone("vit")
    for block in (0, 1):
        before, after = (model(images, blocks=(0, 1)).at(block) for model in (ours, exported))
        for part in ("cls", "registers", "patches"):
            assert torch.equal(getattr(before, part), getattr(after, part))
    left, right = open_source("run/last.ckpt"), open_source("vit")
    same = ("method", "trained_with", "seed", "image_size", "weights", "recipe", "family", "init")  # what rows are found again by
    assert [getattr(left, name) for name in same] == [getattr(right, name) for name in same]
    assert (left.name, right.name) == ("run", "vit")
    assert (exported.mean, exported.std, exported.training) == (ours.mean, ours.std, False)
    assert set(json.loads(Path("vit/config.json").read_text())["ssl_vit"]["versions"]) == {"ssl-vit", "torch", "lightning", "timm"}


@torch.no_grad()
def test_the_student_on_request() -> None:
    module: Any = checkpoint()
    images = torch.randn(2, 3, 16, 16)
    for name, arm in (("run/last.ckpt", module.teacher), ("run/last.ckpt:student", module.student)):
        export(name, arm_folder := name.replace("/", "-").replace(":", "-"))
        expected = arm.backbone.vit.forward_features(images)
        assert torch.equal(timm.create_model(f"local-dir:{arm_folder}", pretrained=True).eval().forward_features(images), expected)
        for source in (open_source(name), open_source(arm_folder)):
            assert source.backbone is not None
            assert torch.equal(source.backbone.vit.forward_features(images), expected)
            assert source.name.endswith(":student") == (arm is module.student)
    assert open_source("run/last.ckpt").weights != open_source("run/last.ckpt:student").weights
    export("run-last.ckpt-student", "again")  # of an exported folder: the same network, under the same name
    assert open_source("again").name == "again:student"
    assert open_source("again").weights == open_source("run/last.ckpt:student").weights
    with pytest.raises(UsageError, match="holds no student: it holds the teacher only"):
        open_source("run-last.ckpt:student")


@torch.no_grad()
def test_a_learned_readout_travels_along() -> None:
    arm: Any = checkpoint(readout="ep_cls").teacher
    export("run/last.ckpt", "vit")
    exported, images = load_backbone("vit"), torch.randn(2, 3, 16, 16)
    assert exported.trained_readout is not None
    assert torch.equal(exported.trained_readout(exported(images)), arm.readout(arm.backbone(images)))
    assert exported.weights_hash() == load_backbone("run/last.ckpt").weights_hash()
    Path("vit/readout.safetensors").unlink()
    with pytest.raises(Failure, match="the weights in vit do not fit its recipe"):
        load_backbone("vit")


def test_a_folder_that_timm_reads_otherwise_is_not_left(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint()
    create = timm.create_model
    changed: Any = lambda *names, **options: create(*names, **options).requires_grad_(False).apply(shift)  # noqa: E731

    def shift(module: torch.nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.add_(1)

    monkeypatch.setattr("ssl_vit.weights.export.timm.create_model", changed)
    with pytest.raises(Failure, match="reads the exported weights as another model"):
        export("run/last.ckpt", "vit")
    assert [path.name for path in Path().iterdir()] == ["run"]


def test_what_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint("mae", "gap")
    Path("full").mkdir()
    Path("full/file").touch()
    Path("empty").mkdir()
    Path("foreign").mkdir()
    Path("foreign/config.json").write_text('{"architecture": "vit_tiny_patch16_224"}')
    for arguments, message in {
        ("run/last.ckpt", "--out", "full"): "full already holds something",
        ("run/last.ckpt", "--out", "full/file"): "already holds something",
        ("run/last.ckpt:student", "--out", "new"): "it holds one network, trained with mae; leave out ':student'",
        ("run", "--out", "new"): "is a folder, not a checkpoint; name the file in it: run/last.ckpt",
        ("nowhere.ckpt", "--out", "new"): "there is no checkpoint nowhere.ckpt",
        ("foreign", "--out", "new"): "was not written by ssl-vit export",
        ("run/last.ckpt",): "--out",
    }.items():
        assert run(["export", *arguments]) in (1, 2)
        errors = capsys.readouterr().err
        assert errors.count("\n") == 1
        assert message in errors
    assert sorted(path.name for path in Path().iterdir()) == ["empty", "foreign", "full", "run"]
    export("run/last.ckpt", "empty")
    config, weights = Path("empty/config.json"), Path("empty/model.safetensors")
    written = json.loads(config.read_text())
    config.write_text(json.dumps({**written, "ssl_vit": {**written["ssl_vit"], "format": 99}}))
    with pytest.raises(Failure, match="empty has checkpoint format 99"):
        load_backbone("empty")
    config.write_text(json.dumps(written))
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(Failure, match="empty is not a readable export"):
        load_backbone("empty")
    weights.unlink()
    with pytest.raises(Failure, match="empty is not a readable export"):
        open_source("empty")
