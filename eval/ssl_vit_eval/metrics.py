"""What an evaluation is scored by: the metrics, their formula, and which of them a dataset is judged by."""

import re

import torch
from jaxtyping import Int64
from torch import Tensor

from ssl_vit_eval.rows import Row

METRICS = TOP1, MACRO = "top1", "top1_macro"  # accuracy over images, and the mean over classes
METRIC_NAMES = {TOP1: "top-1", MACRO: "macro top-1"}  # as lines, columns and axes have them
# Kornblith et al. 2019, "Do better ImageNet models transfer better?"; by the words that they are called by
_BY_CLASS = [{"pets"}, {"iiit", "pet"}, {"oxfordiiitpet"}, {"flowers"}, {"aircraft"}, {"fgvcaircraft"}, {"caltech"}]
_WORD = re.compile("[A-Z]+(?![a-z])|[A-Z]?[a-z]+")  # `OxfordIIITPet`, `oxford_flowers102`, `FGVC-Aircraft`


def accuracies(predictions: Int64[Tensor, " m"], labels: Int64[Tensor, " m"]) -> tuple[float, float]:
    """Micro and macro top-1 accuracy, fractions. Macro is the mean over the classes that have test images."""
    right = (predictions == labels).double()
    _, place, counts = torch.unique(labels, return_inverse=True, return_counts=True)
    of_class = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, place, right) / counts
    return right.mean().item(), of_class.mean().item()


def metric_of(row: Row) -> str:
    """What a row's dataset is judged by: what its suite declares, else the mean over classes for Pets, Flowers, Aircraft and Caltech, whose
    classes differ in size, by whole words of its name; else top-1. Gains, differences and their tests are of this."""
    words = {word.lower() for word in _WORD.findall(row.dataset)}
    return row.dataset_metric or (MACRO if any(known <= words for known in _BY_CLASS) else TOP1)
