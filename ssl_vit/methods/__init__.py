"""Pretraining methods, one file each, in the order of their papers."""

from ssl_vit.methods.base import Method
from ssl_vit.methods.dino import DINO
from ssl_vit.methods.mae import MAE

METHODS: dict[str, type[Method]] = {"dino": DINO, "mae": MAE}

__all__ = ["DINO", "MAE", "METHODS", "Method"]
