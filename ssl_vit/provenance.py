"""What a result came from: the identity of a recipe and the revision of the code."""

import hashlib
import importlib.metadata
import json
import subprocess
from functools import cache
from pathlib import Path
from typing import Any


def recipe_hash(recipe: dict[str, Any]) -> str:
    """16 hex digits over everything in a recipe that can change the result; devices, loggers and folders are not in it."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]


def versions() -> dict[str, str]:
    """Of the packages that decide what a training computes."""
    return {name: importlib.metadata.version(name) for name in ("ssl-vit", "torch", "lightning", "timm")}


@cache
def git_revision() -> str | None:
    """The checkout's revision, with `+` behind it if files differ from it; None for an installed wheel."""
    checkout = Path(__file__).resolve().parents[1]
    if not (checkout / ".git").exists():
        return None

    def git(*args: str) -> str:
        return subprocess.run(["git", "-C", str(checkout), *args], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):  # no git on this machine, or no commit yet
        return None
