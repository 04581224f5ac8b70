"""Recipes, studies, protocols and suites are found in a wheel's layout and in a checkout's."""

from pathlib import Path

import pytest

from ssl_vit import assets
from ssl_vit.assets import find_asset, list_assets
from ssl_vit.errors import UsageError

WHEEL = {
    "recipes": "ssl_vit/recipes",
    "studies": "ssl_vit/recipes/studies",
    "protocols": "ssl_vit_eval/protocols",
    "suites": "ssl_vit_eval/suites",
}
CHECKOUT = {"recipes": "recipes", "studies": "recipes/studies", "protocols": "eval/protocols", "suites": "eval/suites"}


def lay_out(root: Path, folders: dict[str, str]) -> None:
    for kind, folder in folders.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / f"{kind}_b.yaml").write_text("")
        (root / folder / f"{kind}_a.yaml").write_text("")


@pytest.mark.parametrize("folders", [WHEEL, CHECKOUT], ids=["wheel", "checkout"])
@pytest.mark.parametrize("kind", ["recipes", "studies", "protocols", "suites"])
def test_both_layouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folders: dict[str, str], kind: assets.Kind) -> None:
    lay_out(tmp_path, folders)
    monkeypatch.setattr(assets, "_ROOT", tmp_path)
    assert list_assets(kind) == [f"{kind}_a", f"{kind}_b"]
    assert find_asset(kind, f"{kind}_a") == find_asset(kind, f"{kind}_a.yaml") == tmp_path / folders[kind] / f"{kind}_a.yaml"
    with pytest.raises(UsageError, match=f"did you mean '{kind}_a'"):
        find_asset(kind, f"{kind}a")


def test_the_package_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay_out(tmp_path, CHECKOUT)
    lay_out(tmp_path, WHEEL)
    monkeypatch.setattr(assets, "_ROOT", tmp_path)
    assert find_asset("suites", "suites_a") == tmp_path / "ssl_vit_eval/suites/suites_a.yaml"


def test_a_path_is_taken_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("")
    assert find_asset("recipes", str(path)) == path
    with pytest.raises(UsageError, match=rf"unknown recipe '.*other.yaml': no such YAML file in {tmp_path};"):
        find_asset("recipes", str(tmp_path / "other.yaml"))


def test_this_installation_has_its_protocols() -> None:
    assert {"knn", "logreg"} <= set(list_assets("protocols"))
    assert find_asset("protocols", "knn").is_file()
