"""Recipes, studies, protocols and suites by name: inside the packages as the wheel has them, else beside them as a checkout does."""

from pathlib import Path
from typing import Any, Literal

import yaml

from ssl_vit.errors import UsageError, one_of

Kind = Literal["recipes", "studies", "protocols", "suites"]

_ROOT = Path(__file__).resolve().parent.parent  # what holds the packages: site-packages, or the checkout
# in the wheel, in the checkout. An editable install has no first one, so that a stale copy can never win over the source.
_FOLDERS: dict[Kind, tuple[str, str]] = {
    "recipes": ("ssl_vit/recipes", "recipes"),
    "studies": ("ssl_vit/recipes/studies", "recipes/studies"),
    "protocols": ("ssl_vit_eval/protocols", "eval/protocols"),
    "suites": ("ssl_vit_eval/suites", "eval/suites"),
}
_SINGULAR: dict[Kind, str] = {"recipes": "recipe", "studies": "study", "protocols": "protocol", "suites": "suite"}


def find_asset(kind: Kind, name: str) -> Path:
    """The YAML file of `name`: one that exists at this path, or one that comes with ssl_vit, with or without `.yaml`.

    UsageError for an unknown name, with the nearest one that is known.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return path
    shipped = _folder(kind) / f"{name.removesuffix('.yaml')}.yaml"
    if shipped.is_file():
        return shipped
    near, folder = one_of(name, list_assets(kind), map(str, path.parent.glob("*.y*ml"))), path.parent.absolute()
    raise UsageError(f"unknown {_SINGULAR[kind]} {name!r}: no such YAML file in {folder}; {near}, or give the path of a YAML file")


def list_assets(kind: Kind) -> list[str]:
    """The names of the assets of a kind that come with ssl_vit, sorted, without `.yaml`."""
    return sorted(path.stem for path in _folder(kind).glob("*.yaml"))


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; UsageError, in one line, for what is none."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds {content!r}, not keys with values; write KEY: VALUE lines")
    return content


def _folder(kind: Kind) -> Path:
    installed, checkout = (_ROOT / folder for folder in _FOLDERS[kind])
    return installed if installed.is_dir() else checkout
