"""Fine-tuning against the same steps written out, its rates by hand, and what it must leave alone."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from timm.data.mixup import Mixup
from timm.layers import DropPath
from torch.nn import functional as F

from ssl_vit.data.images import ImageStore
from ssl_vit.data.transforms import normalise
from ssl_vit.data.views import Batch, SingleCrop, single_crop
from ssl_vit.errors import UsageError
from ssl_vit.model.backbone import Backbone
from ssl_vit.model.readout import Readout, ReadoutSpec
from ssl_vit_eval.probes import finetune
from ssl_vit_eval.probes.finetune import Network, fit, layer_groups, run, set_drop_path

PARAMETERS: dict[str, Any] = {
    "lr": [0.02],
    "min_lr": 0.001,
    "weight_decay": 0.3,
    "layer_decay": 0.5,
    "batch_size": 9,  # odd: 8 are taken
    "epochs": 2.0,
    "warmup_epochs": 1.0,
    "drop_path": 0.0,
    "crop_scale": [0.5, 1.0],
    "mixup": 0.0,
    "cutmix": 0.0,
    "label_smoothing": 0.1,
    "fresh_norm": False,
    "seed": 5,
    "slice_fraction": 0.1,
    "slice_seed": 0,
}
NONE = torch.zeros(40, dtype=torch.bool)


def red_and_green(n: int, seed: int) -> tuple[ImageStore, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(2, (n,), generator=generator)
    images = torch.randint(156, (n, 3, 16, 16), dtype=torch.uint8, generator=generator)
    images[torch.arange(n), y] += 100
    return ImageStore.stacked(images), 3 * y + 1


def network(backbone: Backbone, spec: str = "cls", seed: int = 0) -> Network:
    torch.manual_seed(seed)
    return Network(backbone, ReadoutSpec.parse(spec), 2, drop_path=0.0, fresh_norm=False)


@pytest.mark.parametrize("mixing", [{}, {"mixup": 0.8, "cutmix": 1.0}])
def test_steps_equal_a_loop(backbone: Backbone, mixing: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Crops, mixing, smoothing, warm-up, cosine, layer-wise rates and decay; in forward passes of 3 images, as of all 8 at once."""
    p = {**PARAMETERS, **mixing}
    images, y = red_and_green(30, seed=0)
    targets, rows = (y - 1) // 3, torch.arange(5, 30)  # 25 images: 3 batches of 8, the last image of each epoch left out
    ours, theirs = network(backbone), network(backbone)
    monkeypatch.setattr(finetune, "_FORWARD", 3)
    np.random.seed(0)
    fit(ours, p, 0.02, images, rows, targets)

    np.random.seed(0)
    generator = torch.Generator().manual_seed(5)
    scale = {f"backbone.vit.blocks.{i}.": 0.5 ** (3 - i) for i in range(3)} | {"backbone.vit.norm": 1.0, "backbone.vit.": 0.5**4, "": 1.0}
    groups = []
    for name, w in theirs.named_parameters():
        decays = w.ndim > 1 and name not in ("backbone.vit.cls_token", "backbone.vit.reg_token", "backbone.vit.pos_embed")
        rate = next(rate for start, rate in scale.items() if name.startswith(start))
        groups.append({"params": [w], "weight_decay": 0.3 if decays else 0.0, "rate": rate})
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.999))
    mix = Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=2)
    theirs.train()
    for step in range(6):
        if step % 3 == 0:
            order = rows[torch.randperm(25, generator=generator)]
        batch = order[step % 3 * 8 : step % 3 * 8 + 8]
        pixels, sizes = images.batch(batch)
        views = single_crop(Batch(pixels, sizes, torch.arange(8 * step, 8 * step + 8), step), 5, SingleCrop(16, (0.5, 1.0)))
        x, soft = normalise(views, backbone.mean, backbone.std), F.one_hot(targets[batch], 2) * 0.9 + 0.05
        if mixing:
            x, soft = mix(x, targets[batch])
        peak = 0.02 * 8 / 256
        lr = peak * step / 3 if step < 3 else 0.001 + (peak - 0.001) * (1 + math.cos(math.pi * (step - 3) / 3)) / 2
        for group in optimizer.param_groups:
            group["lr"] = lr * group["rate"]
        optimizer.zero_grad()
        (-(soft * theirs(x).log_softmax(dim=1)).sum(dim=1)).mean().backward()
        optimizer.step()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_layers_and_decay_by_hand(backbone: Backbone) -> None:
    model = network(backbone, "ep")
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: (g["lr_scale"], g["weight_decay"]) for g in layer_groups(model, 0.5, 0.1) for p in g["params"]}
    assert found.keys() == set(names.values())
    for name, expected in {
        "backbone.vit.cls_token": (0.0625, 0.0),
        "backbone.vit.reg_token": (0.0625, 0.0),
        "backbone.vit.pos_embed": (0.0625, 0.0),
        "backbone.vit.patch_embed.proj.weight": (0.0625, 0.1),
        "backbone.vit.patch_embed.proj.bias": (0.0625, 0.0),
        "backbone.vit.blocks.0.attn.qkv.weight": (0.125, 0.1),
        "backbone.vit.blocks.2.mlp.fc1.weight": (0.5, 0.1),
        "backbone.vit.blocks.2.norm1.weight": (0.5, 0.0),
        "backbone.vit.norm.weight": (1.0, 0.0),
        "readout.poolers.ep.0.queries": (1.0, 0.1),
        "head.weight": (1.0, 0.1),
        "head.bias": (1.0, 0.0),
    }.items():
        assert found[name] == pytest.approx(expected), name


def test_two_classes_are_learnt_and_the_source_stays_as_it_is(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetune, "BATCH", 50)  # of the answers
    train, y = red_and_green(40, seed=0)
    test, y_test = red_and_green(60, seed=1)
    for p in backbone.parameters():
        p.requires_grad_(False)
    weights, states = backbone.weights_hash(), (torch.get_rng_state(), np.random.get_state()[1].tolist())  # type: ignore[union-attr]
    parameters = {**PARAMETERS, "epochs": 4.0, "drop_path": 0.1, "mixup": 0.2, "lr": [1e-7, 0.1], "min_lr": 0.0, "fresh_norm": True}
    held_out = torch.arange(40) < 12
    results = run(parameters, backbone, ["gap/pooled", "cls@block1/pre"], train, y, test, y_test, held_out)
    for found in results.values():
        assert (found.predictions == y_test).double().mean() > 0.85
        assert found.selected == {"lr": 0.1, "batch_size": 8, "iterations": 20}
        assert found.grid is not None
        assert found.grid["slice_accuracy"][0] < found.grid["slice_accuracy"][1]
        assert found.oracle == max(found.grid["test_accuracy"])
    # the second reads neither the last block nor the final norm: they are not used
    whole, block = (sum(p.numel() for p in module.parameters()) for module in (backbone, backbone.vit.blocks[2]))
    assert results["gap/pooled"].parameters == whole + 50
    assert results["cls@block1/pre"].parameters == whole - block - 48 + 50
    assert backbone.weights_hash() == weights
    assert not backbone.training
    assert not any(p.requires_grad for p in backbone.parameters())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]  # type: ignore[union-attr]


def test_the_slice_chooses_and_one_rate_does_not_touch_it(backbone: Backbone) -> None:
    train, y = red_and_green(40, seed=0)
    test, y_test = red_and_green(20, seed=1)
    held_out = torch.arange(40) < 24  # most of train: a network that saw its wrong labels would follow them
    parameters = {**PARAMETERS, "epochs": 4.0, "lr": [1e-7, 0.3], "min_lr": 0.0}
    wrong_on_test = run(parameters, backbone, ["gap"], train, y, test, 5 - y_test, held_out)["gap"]
    wrong_on_slice = run(parameters, backbone, ["gap"], train, torch.where(held_out, 5 - y, y), test, y_test, held_out)["gap"]
    assert (wrong_on_test.selected["lr"], wrong_on_slice.selected["lr"]) == (0.3, 1e-7)
    with pytest.raises(UsageError, match="slice holds 0 of 40"):
        run(parameters, backbone, ["gap"], train, y, test, y_test, NONE)
    one = run({**PARAMETERS, "lr": [0.1]}, backbone, ["gap"], train, y, test, y_test, NONE)["gap"]
    assert (one.grid, one.oracle, one.edge_of_grid, one.selected["lr"]) == (None, None, None, 0.1)


def test_replicates_are_runs_of_other_seeds(backbone: Backbone) -> None:
    train, y = red_and_green(40, seed=0)
    noise = ImageStore.stacked(torch.randint(256, (60, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(2)))
    args = (backbone, ["gap"], train, y, noise, y[:1].repeat(60), NONE)
    found = run({**PARAMETERS, "epochs": 1.0, "probe_seeds": 2}, *args)["gap"]
    alone = [run({**PARAMETERS, "epochs": 1.0, "seed": seed}, *args)["gap"].predictions.tolist() for seed in (5, 6)]
    assert found.predictions.T.tolist() == alone
    assert alone[0] != alone[1]


def test_answers_come_from_whole_images_and_the_whole_network(backbone: Backbone) -> None:
    images, _ = red_and_green(20, seed=0)
    model = Network(backbone, ReadoutSpec.parse("cls"), 9, drop_path=0.9, fresh_norm=False).train()
    x = normalise(images.batch(torch.arange(20))[0].float() / 255, backbone.mean, backbone.std)
    features = backbone(x).normed.cls[:, 0].detach()
    with torch.no_grad():
        model.head.weight.normal_()
        model.head.bias.copy_(-model.head.weight @ features.mean(dim=0))
    expected = ((features - features.mean(dim=0)) @ model.head.weight.T).argmax(dim=1)
    assert len(expected.unique()) > 2
    rows = torch.arange(19, 2, -1)
    assert finetune.predict(model, images, rows, torch.arange(9) * 10).tolist() == (10 * expected[rows]).tolist()


def test_the_seed_alone_decides_what_is_drawn() -> None:
    drawn = []
    for seed in (5, 5, 6):
        torch.rand(1), np.random.rand()
        with finetune._seeded(seed):
            drawn.append((torch.rand(3).tolist(), np.random.rand(3).tolist()))
    assert drawn[0] == drawn[1]
    assert drawn[0][0] != drawn[2][0]
    assert drawn[0][1] != drawn[2][1]


def test_a_run_that_fails_gives_the_generators_back() -> None:
    states = torch.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[union-attr]

    def fail() -> None:
        torch.rand(1), np.random.rand()
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError), finetune._seeded(5):
        fail()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]  # type: ignore[union-attr]


def test_start_of_a_network(backbone: Backbone) -> None:
    torch.nn.init.normal_(backbone.norm.weight)  # type: ignore[arg-type]
    kept, fresh = (Network(backbone, ReadoutSpec.parse("gap"), 2, 0.0, fresh) for fresh in (False, True))
    assert torch.equal(kept.backbone.norm.weight, backbone.norm.weight)  # type: ignore[arg-type]
    assert fresh.backbone.norm.weight.tolist() == [1.0] * 24  # type: ignore[union-attr, operator]
    trained = backbone.trained_readout = Readout(ReadoutSpec.parse("ep"), 24)
    goes_on, anew = (Network(backbone, ReadoutSpec.parse(spec), 2, 0.0, False).readout for spec in ("ep", "ep_cls"))
    assert goes_on is not trained
    assert all(torch.equal(mine, source) for mine, source in zip(goes_on.parameters(), trained.parameters(), strict=True))
    assert not all(torch.equal(mine, source) for mine, source in zip(anew.parameters(), trained.parameters(), strict=True))


def test_drop_path_grows_to_its_rate_and_replaces_what_was_there(backbone: Backbone) -> None:
    for rate, expected in ((0.2, [0.0, 0.1, 0.2]), (0.0, [0.0, 0.0, 0.0])):
        set_drop_path(backbone, rate)
        for name in ("drop_path1", "drop_path2"):
            places = [getattr(block, name) for block in backbone.vit.blocks]
            assert [place.drop_prob if isinstance(place, DropPath) else 0.0 for place in places] == pytest.approx(expected)


def test_bad_input_is_named(backbone: Backbone) -> None:
    train, y = red_and_green(40, seed=0)
    with pytest.raises(UsageError, match="all 40 training labels are 1"):
        run(PARAMETERS, backbone, ["gap"], train, torch.ones_like(y), train, y, NONE)
    with pytest.raises(UsageError, match="batch_size is 1, for 40 training images; it must be 2 or more"):
        run({**PARAMETERS, "batch_size": 1}, backbone, ["gap"], train, y, train, y, NONE)
    stripped = copy.deepcopy(backbone)
    for block in stripped.vit.blocks:
        del block.drop_path1, block.drop_path2
    with pytest.raises(UsageError, match="no drop path; set drop_path to 0"):
        set_drop_path(stripped, 0.1)
