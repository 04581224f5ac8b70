"""One pass over the images of a split yields the features of every readout."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from ssl_vit.images import ImageStore
from ssl_vit_eval.models import Source

BATCH = 256


@torch.inference_mode()
def extract(
    source: Source, images: ImageStore, specs: Sequence[str], description: str, progress: bool = True
) -> dict[str, Float[Tensor, "n _"]]:
    """Features in float32 on the CPU, one tensor a readout; images must already have the source's size."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if source.backbone is not None:
        source.backbone.to(device)
    parts: dict[str, list[Tensor]] = {spec: [] for spec in specs}
    for indices in tqdm(torch.split(torch.arange(len(images)), BATCH), desc=description, leave=False, disable=not progress):
        batch, _ = images.batch(indices)
        for spec, values in source.features(batch.to(device), specs).items():
            parts[spec].append(values.cpu())
    return {spec: torch.cat(values) for spec, values in parts.items()}
