"""What a training costs, counted on a module that is not trained: operations of an image, bytes of a step."""

import warnings
import weakref
from collections import defaultdict
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from ssl_vit.data.views import Batch
from ssl_vit.methods.base import Method
from ssl_vit.model.backbone import Backbone


def training_flops(module: Method, fake: FakeTensorMode | None = None) -> int:
    """Operations of one image's forward and backward passes, two for each multiply-add: what the model needs, on any machine.

    module: as built from a recipe, outside of a Trainer; its gradients, its schedule and DINO's centre are changed. fake: the mode
    that the module's tensors belong to, if they are fake ones: nothing is computed, which takes seconds whatever the size.
    Matrix products, convolutions and attention are counted, element-wise operations and the optimiser's step are not; nor are the
    views, which are made of the data (by products on a device, otherwise by a worker). Attention is its two products and the four of
    their gradients; a fused kernel computes one of them again, and torch's versions disagree on how to count it.
    """
    for part in module.modules():
        if isinstance(part, Backbone):
            part.checkpointing = False  # does not change what the model needs
    batch = _blank(module, 2)
    views = module.views(batch)  # not on fake tensors: they draw numbers on the host
    views = tree_map(fake.from_tensor, views) if fake else views
    with fake or nullcontext(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        _loss(module, batch, views).backward()  # type: ignore[no-untyped-call]
    return int(counter.get_total_flops()) // 2


def step_bytes(module: Method, fake: FakeTensorMode, images: int, half: bool) -> int:
    """The most that views, activations, temporaries and gradients take at once, forward and backward, of so many images: what stands
    beside the weights. module: made of `fake`'s tensors. half: under autocast to 16 bits."""
    module.zero_grad(set_to_none=True)
    two, three = (module.views(_blank(module, count)) for count in (2, 3))
    batch = _blank(module, images)
    with fake:
        views = tree_map(lambda a, b: torch.empty([m + (n - m) * (images - 2) for m, n in zip(a.shape, b.shape, strict=True)]), two, three)
    weights = [*module.parameters(), *module.buffers()]
    with fake, Peak([*weights, *tree_leaves(views)]) as memory:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = _loss(module, batch, views)
        loss.backward()  # type: ignore[no-untyped-call]
    return int(memory.most) - sum(tensor.nbytes for tensor in weights)


def _blank(module: Method, images: int) -> Batch:
    """For a training step without a Trainer."""
    module.scheduled = defaultdict(lambda: 1.0)  # temperatures and rates do not change the count
    size = module.backbone.image_size
    return Batch(torch.zeros(images, 3, size, size, dtype=torch.uint8), torch.full((images, 2), size), torch.arange(images), 0)


def _loss(module: Method, batch: Batch, views: Any) -> Tensor:
    module.views = lambda batch: views  # type: ignore[method-assign]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's, that without a Trainer nothing is logged
        loss = module.training_step(batch, 0)
    del module.views  # the class's own again
    assert isinstance(loss, Tensor)
    return loss


class Peak(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of `held` and of the tensors that are made; most: those alive at once."""

    def __init__(self, held: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive: dict[int, Any] = {}
        self.bytes = self.most = 0
        for tensor in held:
            self._count(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key not in self.alive:
            self.alive[key] = weakref.ref(storage, lambda _: self._free(key, size))
            self.bytes += size
            self.most = max(self.most, self.bytes)

    def _free(self, key: int, size: int) -> None:
        del self.alive[key]
        self.bytes -= size
