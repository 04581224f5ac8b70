"""Self-supervised pretraining of Vision Transformers, built to compare readouts: which token should carry the image?"""

from ssl_vit.backbone import Backbone
from ssl_vit.checkpoint import load_backbone
from ssl_vit.readout import readout
from ssl_vit.tokens import Tokens

__all__ = ["Backbone", "Tokens", "load_backbone", "readout"]
