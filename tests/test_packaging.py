"""The wheel: exactly two packages, with everything that the commands look up by name."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

CHECKOUT = Path(__file__).parents[1]


def test_wheel_holds_two_packages_and_works_without_the_checkout(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=CHECKOUT, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert {name.split("/")[0] for name in names} == {"ssl_vit", "ssl_vit_eval", "ssl_vit-0.1.0.dist-info"}
    for asset in ("ssl_vit/recipes/dino_photos.yaml", "ssl_vit/recipes/studies/quickstart.yaml", "ssl_vit_eval/protocols/knn.yaml"):
        assert asset in names
    for asset in ("report.css", "report.js", "page.html", "blocks.html", "scores.html", "glance.html", "words.yaml", "report.mplstyle"):
        assert f"ssl_vit_eval/report/templates/{asset}" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    script = (
        "import ssl_vit, ssl_vit.assets as a; from ssl_vit.train.pretrain import parse_recipe; parse_recipe('mae_photos', []);"
        "from ssl_vit_eval.protocols import load_protocol; load_protocol('logreg'); print(a.find_asset('studies', 'quickstart'))"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == str(tmp_path / "site" / "ssl_vit" / "recipes" / "studies" / "quickstart.yaml"), done.stderr


def test_the_checkout_holds_no_copy_that_could_go_stale() -> None:
    assert not (CHECKOUT / "ssl_vit" / "recipes").exists()
    assert not (CHECKOUT / "eval" / "ssl_vit_eval" / "protocols").exists()
