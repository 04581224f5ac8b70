"""docs/extend.md is true: every block of it runs, and what it adds goes through the commands. Method's contract is checked."""

import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from ssl_vit.cli import run
from ssl_vit.data.stream import Batch
from ssl_vit.errors import UsageError
from ssl_vit.methods import DINO, METHODS, Method
from ssl_vit.model import readout as readouts
from ssl_vit.model.config import BackboneConfig
from ssl_vit.model.readout import READOUTS, Entry, ReadoutSpec
from ssl_vit.train.cost import training_flops
from ssl_vit.train.pretrain import build_method, parse_recipe

GUIDE = (Path(__file__).parents[1] / "docs" / "extend.md").read_text()
STRONGEST, GATE, SIMSIAM = re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL)
RECIPE, RULE = re.findall(r"```yaml\n(.*?)```", GUIDE, flags=re.DOTALL)


pytestmark = pytest.mark.usefixtures("three_classes")


@pytest.fixture
def added() -> Iterator[None]:
    """The guide's readouts in the table, as its text defines them beside the others."""
    before = dict(READOUTS)
    names = {**vars(readouts), "nn": nn, "torch": torch}
    exec(compile(STRONGEST + GATE, "extend.md", "exec", dont_inherit=True), names)
    yield
    READOUTS.clear()
    READOUTS.update(before)


@pytest.fixture
def simsiam(tmp_path: Path, three_classes: None, monkeypatch: pytest.MonkeyPatch) -> type[Method]:
    monkeypatch.syspath_prepend(tmp_path)
    Path("simsiam_of_the_guide.py").write_text(SIMSIAM)
    Path("simsiam.yaml").write_text(RECIPE)
    method: type[Method] = importlib.import_module("simsiam_of_the_guide").SimSiam
    monkeypatch.setitem(METHODS, "simsiam", method)
    monkeypatch.delitem(importlib.sys.modules, "simsiam_of_the_guide")  # of this test's folder
    return method


def test_readme_shows_the_same_readout() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    assert STRONGEST.split("\n\n\n")[0] in readme
    assert len(SIMSIAM.split("class SimSiam")[1].splitlines()) < 66


@pytest.mark.usefixtures("added")
def test_added_readouts_train_and_are_read(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("strongest", "gate_cls"):
        assert run(["pretrain", "mae.yaml", "--readout", name, "--out", name, "--trainer.accelerator", "cpu"]) == 0
    Path("rule.yaml").write_text(RULE)
    command = [
        "eval",
        "strongest/last.ckpt",
        "gate_cls/last.ckpt",
        "--data",
        "builtin:photos-new",
        "--protocols",
        "rule.yaml",
        "--out",
        "out",
    ]
    assert run([*command, "--readouts", "trained", "cls+strongest/pre"]) == 0
    rows = [json.loads(line) for line in Path("out/rows.jsonl").read_text().splitlines()]
    assert {(row["protocol"], row["trained_with"], row["read_with"]) for row in rows} == {
        ("rule", "strongest", "strongest"),
        ("rule", "strongest", "cls+strongest/pre"),
        ("rule", "gate_cls", "gate_cls"),
        ("rule", "gate_cls", "cls+strongest/pre"),
    }


def test_simsiam_goes_through_the_commands(simsiam: type[Method], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["pretrain", "simsiam.yaml", "--out", "run", "--trainer.accelerator", "cpu"]) == 0
    Path("simsiam.yaml").write_text(RECIPE.replace("builtin:photos-new", "./pictures"))
    study = {"recipes": ["simsiam.yaml"], "trained_with": ["cls", "gap"], "seeds": [0], "data": ["./pictures"]}
    Path("study.yaml").write_text(yaml.safe_dump({**study, "protocols": ["knn"], "read_with": ["cls", "gap"]}))
    assert run(["study", "study.yaml", "--dry-run"]) == 0
    assert "all: 2 cells" in capsys.readouterr().out
    assert run(["eval", "run/last.ckpt", "random:simsiam.yaml", "--data", "./pictures", "--protocols", "knn", "--out", "out"]) == 0
    assert {json.loads(line)["method"] for line in Path("out/rows.jsonl").read_text().splitlines()} == {"simsiam", "random"}
    assert run(["pretrain", "simsiam.yaml", "--help"]) == 0
    assert "dino, mae, simsiam; a recipe's first line" in " ".join(capsys.readouterr().out.split())


def test_simsiams_loss_is_the_papers(simsiam: type[Method], batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Algorithm 1, an image at a time; and its operations, counted by hand."""
    parser, config = parse_recipe("simsiam.yaml", [])
    method = build_method(config, parser.instantiate(config))
    seen: dict[str, list[torch.Tensor]] = {"project": [], "predict": []}
    for name, values in seen.items():
        getattr(method, name).register_forward_hook(lambda _, __, out, values=values: values.append(out.detach()))
    monkeypatch.setattr(method, "report", lambda loss: None)
    loss = method.training_step(batch, 0)
    (z1, z2), (p1, p2) = seen["project"], seen["predict"]
    cosines = [(p @ z) / (p.norm() * z.norm()) for p, z in [*zip(p1, z2, strict=True), *zip(p2, z1, strict=True)]]
    torch.testing.assert_close(loss.detach(), -sum(cosines) / 16)

    fresh = build_method(config, parser.instantiate(config))
    counted: list[int] = []
    for layer in fresh.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(lambda _, inputs, out: counted.append(out.numel() * inputs[0].shape[-1]))
    flops = training_flops(fresh)
    tokens, patches = 16 + 2, 16
    attention, embed = 2 * 2 * tokens**2 * 24, patches * 24 * 3 * 64  # multiply-adds of a view
    # two images have been counted; no gradient of the views, which themselves do not count
    assert flops == 3 * sum(counted) + 2 * 2 * (3 * attention + 2 * embed)


@pytest.mark.parametrize("name", ["top2", "m2_cls", "top12"])
@pytest.mark.parametrize("of", ["patches", "registers"])
def test_a_name_with_a_digit_is_used(name: str, of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(READOUTS, name, Entry(READOUTS["gap"].read, of=of))
    for text in (name, f"{name}/pre", f"{name}@last2", f"cls0+{name}"):
        spec = ReadoutSpec.parse(text)
        assert (str(spec), spec.terms[-1].name, spec.terms[-1].index) == (text, name, None)


@pytest.mark.parametrize("name", ["cls0", "Top", "top-2", "2top", ""])
def test_a_name_that_could_not_be_used_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"READOUTS holds {name!r}: a name has a-z, 0-9 and _"):
        readouts.check_names({**READOUTS, name: Entry(READOUTS["gap"].read, of="patches")})


@pytest.mark.parametrize("lacking", ["name", "views", "training_step", "readout", "seed"])
def test_a_method_that_lacks_something_is_refused_when_it_is_made(lacking: str) -> None:
    def init(self: Method, readout: str, backbone: BackboneConfig, optim: object, seed: int) -> None: ...

    def other(self: Method, backbone: BackboneConfig, optim: object) -> None: ...

    whole = {"name": "mine", "__init__": init, "views": DINO.views, "training_step": DINO.training_step}
    assert type("Whole", (Method,), whole)
    if lacking in whole:
        del whole[lacking]
    else:
        whole["__init__"] = other
    with pytest.raises(TypeError) as error:
        type("Mine", (Method,), whole)
    assert re.search(rf"^the method Mine lacks .*{lacking}.*; docs/extend.md shows a whole one$", str(error.value))
