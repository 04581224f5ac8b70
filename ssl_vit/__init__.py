"""Self-supervised pretraining of Vision Transformers, built to compare readouts: which token should carry the image?"""

from ssl_vit.model.backbone import Backbone
from ssl_vit.model.readout import readout
from ssl_vit.model.tokens import Tokens
from ssl_vit.weights.checkpoint import load_backbone

__all__ = ["Backbone", "Tokens", "load_backbone", "readout"]
