"""The judging side of ssl_vit: features, probes, rows, comparison. Labels begin here; of training it sees the checkpoint."""

from ssl_vit_eval.probes.knn import KNNProbe
from ssl_vit_eval.probes.logreg import LinearProbe

__all__ = ["KNNProbe", "LinearProbe"]
