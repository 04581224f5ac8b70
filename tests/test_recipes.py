"""Every shipped recipe parses, and trains two steps at its full size on JPEGs of 500 x 375 px."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssl_vit.train.pretrain import parse_recipe, pretrain

RECIPES = sorted(path.stem for path in (Path(__file__).parents[1] / "recipes").glob("*.yaml"))
SMALL = {name for name in RECIPES if not name.endswith(("in1k", "imagenette"))}


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("jpegs")
    generator = np.random.default_rng(0)
    for number in range(8):
        small = Image.fromarray(generator.integers(0, 256, (15, 20, 3), dtype=np.uint8))
        path = folder / "train" / f"class{number % 2}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        small.resize((500, 375), Image.Resampling.BICUBIC).save(path)
    return folder


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_parses(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, config = parse_recipe(name, [])
    assert config.method == name.split("_")[0]
    with pytest.raises(SystemExit) as stopped:
        parse_recipe(name, ["--print_config"])
    assert not stopped.value.code
    assert "method:" in capsys.readouterr().out


@pytest.mark.parametrize("name", [name if name in SMALL else pytest.param(name, marks=pytest.mark.slow) for name in RECIPES])
def test_recipe_trains_two_steps_at_full_size(name: str, jpegs: Path, tmp_path: Path) -> None:
    machine = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.precision=32", "--trainer.enable_progress_bar=false"]
    short = ["--data.batch_size=2", "--trainer.max_steps=2", "--trainer.log_every_n_steps=1"]
    pretrain(name, [f"--data.source={jpegs}", f"--out={tmp_path / 'run'}", *short, *machine])
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(np.isfinite(line["loss"]) for line in lines)
