"""The rooms of `ssl_vit` and the wings of `ssl_vit_eval`: what a module imports lies in its own one or further down, so that the code reads
in one direction. Imports inside functions count as well."""

import ast
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]
FOLDERS = {"ssl_vit": CHECKOUT / "ssl_vit", "ssl_vit_eval": CHECKOUT / "eval" / "ssl_vit_eval"}
# from the top down; what stands at the root is named by its file
ROOMS = {
    "ssl_vit": ("__main__", "cli", "train", "methods", "weights", "data", "model", "provenance", "assets", "files", "errors"),
    "ssl_vit_eval": (
        *("study", "report", "compare"),
        *("evaluate", "evaluation", "results", "tracking", "diagnostics", "protocols", "probes", "features"),
        *("suites", "splits", "lazy_images", "stats", "sources", "controls"),
        *("metrics", "rows", "memory", "distributed", "schema"),
    ),
}
MODULES = [
    pytest.param(package, path, id=str(path.relative_to(folder.parent)))
    for package, folder in FOLDERS.items()
    for path in sorted(folder.rglob("*.py"))
    if path != folder / "__init__.py"  # whose public names come from everywhere
]


def room(package: str, path: Path) -> str:
    return path.relative_to(FOLDERS[package]).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """The modules of the two packages that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        assert not getattr(node, "level", 0), f"{path} imports relative to itself; name the whole module"
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} if node.module in FOLDERS else {node.module}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in names if name.split(".")[0] in FOLDERS}


def upward(package: str, path: Path) -> set[str]:
    """What a file imports of its own package that lies above it."""
    rooms, found = ROOMS[package], set()
    for name in imported(path):
        of, *parts = name.split(".")
        if of == package and (not parts or parts[0] not in rooms or rooms.index(parts[0]) < rooms.index(room(package, path))):
            found.add(name)  # a public name of the package itself stands above all rooms
    return found


@pytest.mark.parametrize(("package", "path"), MODULES)
def test_imports_go_down_only(package: str, path: Path) -> None:
    place = str(path.relative_to(FOLDERS[package]))
    if package == "ssl_vit" and any(name.startswith("ssl_vit_eval") for name in imported(path)):
        assert place == "cli.py", f"only cli.py may know the judging side, not {place}"
    assert not upward(package, path), f"{place} imports what lies above it"


def test_every_module_has_a_room() -> None:
    for package, rooms in ROOMS.items():
        assert {room(package, module.values[1]) for module in MODULES if module.values[0] == package} == {*rooms}


def test_every_wing_says_what_happens_in_it() -> None:
    wings = [path for path in FOLDERS["ssl_vit_eval"].iterdir() if any(path.glob("*.py"))]
    for wing in wings:
        assert ast.get_docstring(ast.parse((wing / "__init__.py").read_text())), wing.name
