"""What a training costs, counted: the floating-point operations of one image through a method."""

import warnings
from collections import defaultdict

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ssl_vit.data.stream import Batch
from ssl_vit.methods.base import Method
from ssl_vit.model.backbone import Backbone


def training_flops(module: Method) -> int:
    """Operations of one image's forward and backward passes, two for each multiply-add: what the model needs, on any machine.

    module: as built from a recipe, outside of a Trainer; its gradients, its schedule and DINO's centre are changed. Matrix products,
    convolutions and attention are counted, element-wise operations and the optimiser's step are not; nor are the views, which are made
    of the data (by products on a device, otherwise by a worker). Attention is its two products and the four of their gradients; a fused
    kernel computes one of them again, and torch's versions disagree on how to count it.
    """
    size = module.backbone.image_size
    images = torch.zeros(2, 3, size, size, dtype=torch.uint8)  # one has no variance over the batch, which a BatchNorm refuses
    batch = Batch(images, torch.full((2, 2), size), torch.arange(2), 0)
    for part in module.modules():
        if isinstance(part, Backbone):
            part.checkpointing = part.uncompiled = False  # neither changes what the model needs
    views = module.views(batch)
    module.views = lambda batch: views  # type: ignore[method-assign]
    module.scheduled = defaultdict(lambda: 1.0)  # temperatures and rates do not change the count
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's, that without a Trainer nothing is logged
        loss = module.training_step(batch, 0)
        assert isinstance(loss, torch.Tensor)
        loss.backward()  # type: ignore[no-untyped-call]
    del module.views
    return int(counter.get_total_flops()) // 2
