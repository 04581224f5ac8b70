"""From what a protocol found to rows: accuracies over images and over classes, their intervals, and all that they are of."""

from collections.abc import Sequence

import torch
from jaxtyping import Int64
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy

from ssl_vit.provenance import git_revision
from ssl_vit.sources import Split
from ssl_vit_eval.models import Source
from ssl_vit_eval.rows import Key, Row
from ssl_vit_eval.selection import Found
from ssl_vit_eval.stats import macro_interval, mean_interval, wilson_interval

METRICS = ("top1", "top1_macro")


def make_rows(
    source: Source, key: Key, found: Found, train: Split, test: Split, width: int, seconds: float, deviations: Sequence[str]
) -> list[Row]:
    """The two numbers of one evaluation: top-1 over images (Wilson's interval) and over classes (bootstrap within classes).

    Of several draws of the training set both are means, with a bootstrap interval over the images for these draws."""
    labels = test.labels
    assert labels is not None
    predictions = found.predictions.reshape(len(labels), -1)
    share = (predictions == labels[:, None]).double().mean(dim=1)
    one = predictions.shape[1] == 1
    scores = torch.tensor([accuracies(draw.contiguous(), labels) for draw in predictions.T], dtype=torch.float64).mean(dim=0).tolist()
    intervals = [wilson_interval(int(share.sum()), len(share)) if one else mean_interval(share), macro_interval(share, labels)]
    return [
        Row(
            method=source.method,
            trained_with=source.trained_with,
            read_with=key.read_with,
            dataset=train.dataset,
            protocol=key.protocol,
            protocol_version=key.protocol_version,
            metric=metric,
            value=value,
            ci_low=interval.low,
            ci_high=interval.high,
            n_train=len(train.images),
            n_test=len(test.images),
            seed=source.seed,
            selected=found.selected,
            grid=found.grid,
            edge_of_grid=found.edge_of_grid,
            oracle=found.oracle if metric == "top1" else None,
            deviations=list(deviations),
            seconds=round(seconds, 3),
            checkpoint=source.weights,
            recipe=source.recipe,
            family=source.family,
            init=source.init,
            data=key.data,
            transform=key.transform,
            git=git_revision(),
            source=source.name,
            control=key.control,
            width=width,
            parameters=found.parameters,
            bank=found.bank,
        )
        for metric, value, interval in zip(METRICS, scores, intervals, strict=True)
    ]


def accuracies(predictions: Int64[Tensor, " m"], labels: Int64[Tensor, " m"]) -> tuple[float, float]:
    """Micro and macro top-1 accuracy, fractions. Macro is the mean over the classes that have test images."""
    classes = int(torch.maximum(predictions.max(), labels.max())) + 1
    micro = multiclass_accuracy(predictions, labels, num_classes=classes, average="micro").item()
    # torchmetrics' own macro counts a class that is only predicted, never true, as one of accuracy 0
    of_class = multiclass_accuracy(predictions, labels, num_classes=classes, average="none")
    return micro, of_class[torch.unique(labels)].mean().item()
