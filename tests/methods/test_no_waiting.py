"""A training step never waits for the host: the whole step on fake tensors (and in test_gpu.py under torch's own check).

On a fake CPU all of it; on a fake GPU, where copies show too, all but the backward pass (autograd asks the driver for a real one)."""

from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ssl_vit.data import views
from ssl_vit.data.stream import Batch
from ssl_vit.data.views import SingleCrop
from ssl_vit.methods import DINO, MAE, Method
from ssl_vit.methods.mae import DecoderConfig
from ssl_vit.methods.optim import OptimConfig, adamw, clip_each
from ssl_vit.model import positions
from tests.conftest import TINY
from tests.methods.test_dino import attach, tiny


class HostCopy(RuntimeError):
    pass


class NoHostCopies(TorchDispatchMode):
    """Refuses copies between host and device: fake tensors themselves only refuse what depends on data."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[-1] if func is torch.ops.aten.copy_.default else args[0]
            if source.device.type != result.device.type:
                raise HostCopy(f"{func} from {source.device} to {result.device}")
        return result


def dino() -> Method:
    return attach(tiny())


def mae() -> Method:
    return attach(MAE(backbone=TINY, decoder=DecoderConfig(width=16, depth=2, heads=2), crop=SingleCrop(size=16)))  # type: ignore[arg-type]


def step(module: Method, batch: Batch) -> None:
    """Both passes, the look at their numbers, clipping, AdamW and the teacher's average. Without the backward pass on a fake GPU: there
    gradients are given."""
    optimizer = module.configure_optimizers()

    def both_passes() -> torch.Tensor:
        loss = module.training_step(batch, 0)
        assert isinstance(loss, torch.Tensor)
        if batch.images.device.type == "cpu":
            loss.backward()  # type: ignore[no-untyped-call]
        else:
            for parameter in module.parameters():
                parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        module.on_before_optimizer_step(optimizer)
        if isinstance(module, DINO):
            module.configure_gradient_clipping(optimizer)
        return loss

    module.optimizer_step(0, 0, optimizer, both_passes)


def faked(module: Method, device: str) -> None:
    """The module's parameters and buffers on a device that need not be there. To be called under FakeTensorMode."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                on_gpu = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                part._parameters[name] = nn.Parameter(on_gpu, requires_grad=parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)


def fake_step(build: Any, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # drawn on the host from (seed, step) alone, whatever the device does; as fake numbers they would have no value
    monkeypatch.setattr(views, "jitter_orders", lambda seed, step: [[0, 1, 2, 3], [3, 2, 1, 0]])
    monkeypatch.setattr(positions, "_BICUBIC", {})  # real matrices of tests before this one
    module = build()
    module.trainer.log_every_n_steps = 10
    del module.report
    monkeypatch.setattr(FakeTensorMode, "avoid_device_init", property(lambda self: True))  # or a real GPU gets constants unseen
    with FakeTensorMode():
        faked(module, device)
        images = torch.empty(8, 3, 16, 16, dtype=torch.uint8, device=device)
        batch = Batch(images, *(torch.empty(shape, dtype=torch.int64, device=device) for shape in ((8, 2), (8,))), 0)
        with NoHostCopies():
            step(module, batch)


@pytest.mark.parametrize("build", [dino, mae])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_whole_step_has_no_operation_that_waits_for_the_device(build: Any, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_step(build, device, monkeypatch)


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (lambda x: x[(x > 0).nonzero()[:, 0]].sum(), DynamicOutputShapeException),
        (lambda x: x.sum() * float(x.sum()), DataDependentOutputException),
        (lambda x: (x * torch.tensor([1.0, 2.0, 3.0], device=x.device)[:, None, None]).sum(), HostCopy),
        (lambda x: x.sum() * x.cpu().sum().to(x.device), HostCopy),
    ],
)
def test_a_step_that_would_wait_is_found(spoil: Any, error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def build() -> Method:
        module = mae()
        module.targets = lambda images: MAE.targets(module, images) + spoil(images)  # type: ignore[assignment, arg-type]
        return module

    with pytest.raises(error):
        fake_step(build, "cuda", monkeypatch)


def test_fused_adamw_and_clipping_equal_plain_loops() -> None:
    """Decoupled weight decay and each gradient's own norm, written out parameter by parameter."""
    config = OptimConfig(lr=1e-2, min_lr=0.0, warmup_epochs=0.0, weight_decay=0.1, weight_decay_end=0.1)
    module = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3)).double()
    plain = [parameter.detach().clone() for parameter in module.parameters()]
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in plain]
    optimizer = adamw(module, config)
    assert optimizer.defaults["fused"]
    for number in range(1, 6):
        gradients = [torch.randn_like(p) * scale for p, scale in zip(plain, (0.1, 1.0, 5.0, 9.0, 0.01, 3.0), strict=True)]
        for parameter, gradient in zip(module.parameters(), gradients, strict=True):
            parameter.grad = gradient.clone()
        clip_each(module.parameters(), 2.0)
        optimizer.step()
        for p, g, (first, second) in zip(plain, gradients, moments, strict=True):
            g = g * min(1.0, 2.0 / (g.norm().item() + 1e-6))
            first.mul_(0.9).add_(0.1 * g)
            second.mul_(0.999).add_(0.001 * g * g)
            p.mul_(1 - 1e-2 * (0.1 if p.ndim > 1 else 0.0))
            p.sub_(1e-2 * (first / (1 - 0.9**number)) / ((second / (1 - 0.999**number)).sqrt() + 1e-8))
    for stepped, expected in zip(module.parameters(), plain, strict=True):
        torch.testing.assert_close(stepped.detach(), expected, atol=1e-12, rtol=0)
