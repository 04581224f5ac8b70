"""The rooms of `ssl_vit`: what a module imports lies in its own room or further down, so that the code reads in one direction."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ssl_vit"
# from the top down; what stands at the root is named by its file
ROOMS = ("__main__", "cli", "train", "methods", "weights", "data", "model", "provenance", "assets", "files", "errors")
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")


def room(parts: tuple[str, ...]) -> str:
    return parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """The modules of the two packages that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)} if node.module == "ssl_vit" else {node.module}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in names if name.split(".")[0] in ("ssl_vit", "ssl_vit_eval")}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_only(path: Path) -> None:
    own = ROOMS.index(room(path.relative_to(PACKAGE).parts))
    for name in imported(path):
        package, *parts = name.split(".")
        if package == "ssl_vit_eval":
            assert room(path.relative_to(PACKAGE).parts) == "cli", f"only cli.py may know the judging side, not {path}"
        elif parts and parts[0] in ROOMS:
            assert ROOMS.index(parts[0]) >= own, f"{path.relative_to(PACKAGE)} imports {name}, which lies above it"


def test_every_module_has_a_room() -> None:
    assert {room(path.relative_to(PACKAGE).parts) for path in MODULES} <= {*ROOMS}
