"""The judging side of ssl_vit: features, probes, rows, comparison. Labels begin here; of training it sees the checkpoint."""

from ssl_vit_eval.knn import KNNProbe
from ssl_vit_eval.linear import LinearProbe

__all__ = ["KNNProbe", "LinearProbe"]
