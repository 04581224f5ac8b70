"""Self-supervised pretraining of Vision Transformers, built to compare readouts: which token should carry the image?"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssl_vit.model.backbone import Backbone
    from ssl_vit.model.readout import readout
    from ssl_vit.model.tokens import Tokens
    from ssl_vit.weights.checkpoint import load_backbone

__all__ = ["Backbone", "Tokens", "load_backbone", "readout"]
_HOMES = {"Backbone": "model.backbone", "Tokens": "model.tokens", "load_backbone": "weights.checkpoint", "readout": "model.readout"}


def __getattr__(name: str) -> Any:
    """Imported when asked for: torch and timm take seconds, in which the command would not answer, nor to Ctrl-C."""
    if name not in _HOMES:
        raise AttributeError(f"module 'ssl_vit' has no attribute {name!r}")
    return getattr(import_module(f"ssl_vit.{_HOMES[name]}"), name)
