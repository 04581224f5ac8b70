"""What `backbone.compile` asks for: equal within rounding, and plain where nothing compiles."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from ssl_vit.data.stream import Batch
from ssl_vit.methods.dino import dino_loss
from ssl_vit.model.compiler import compiles, fusing
from tests.conftest import TINY, unchecked
from tests.methods.test_dino import attach, tiny


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    compiles.cache_clear()
    yield
    compiles.cache_clear()


def test_without_a_compiler_all_runs_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", broken)
    module = attach(tiny(backbone=replace(TINY, compile=True)))
    with pytest.warns(UserWarning, match="nothing compiles here") as said:
        module.on_train_start()
    assert len(said) == 1
    assert not module.compiled
    assert all(block._compiled_call_impl is None for block in module.backbone.vit.blocks)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the compiler warns about its own code
def test_compiled_training_equals_plain_within_rounding(device: str) -> None:
    """The whole step: views, both networks, loss. 64 roundings of float32 at the size of a parameter's largest gradient, on a GPU 1,024."""
    roundings, close = (1024, 1e-4) if device == "cuda" else (64, 1e-5)
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    torch.manual_seed(0)
    images = torch.randint(0, 256, (4, 3, 40, 40), dtype=torch.uint8)
    batch = Batch(images.to(device), torch.full((4, 2), 40).to(device), torch.arange(4).to(device), 3)
    gradients, views = [], []
    for on in (False, True):
        torch.manual_seed(0)
        module = attach(tiny(backbone=replace(TINY, compile=on))).to(device)
        with unchecked():
            module.on_train_start()
            views.append(module.views(batch))
            module.training_step(batch, 0).backward()
        assert module.compiled == on
        gradients.append({name: p.grad for name, p in module.named_parameters() if p.grad is not None})
    for plain, fused in zip(*views, strict=True):
        assert not torch.equal(plain, fused)  # something was compiled
        torch.testing.assert_close(fused, plain, rtol=0, atol=close)
    for name, value in gradients[0].items():
        assert (gradients[1][name] - value).abs().max() <= roundings * 2**-23 * max(value.abs().max().item(), 1), name


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_fused_loss_sums_in_float32() -> None:
    targets, student = (4 * torch.randn(2, 16, 4096)).softmax(-1), torch.randn(6, 16, 4096)
    exact = dino_loss(targets.double(), student.double(), 0.1).item()
    with unchecked(), fusing(True), torch.autocast("cpu", dtype=torch.bfloat16):
        loss = dino_loss(targets, student, 0.1)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact, rel=1e-5)
