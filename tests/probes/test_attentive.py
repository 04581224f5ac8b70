"""Attentive probes against separate trainings with torch.optim, and the cache of their tokens against the backbone."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from ssl_vit.data.images import ImageStore
from ssl_vit.data.transforms import normalise
from ssl_vit.errors import Failure, UsageError
from ssl_vit.model.backbone import Backbone
from ssl_vit.model.readout import ReadoutSpec
from ssl_vit.model.tokens import Tokens
from ssl_vit_eval.features.tokens import TokenReader, open_tokens, pack, unpack
from ssl_vit_eval.probes import attentive
from ssl_vit_eval.probes.attentive import TokenProbe, run
from ssl_vit_eval.probes.selection import stratified_slice
from ssl_vit_eval.sources import Source

PARAMETERS: dict[str, Any] = {
    "lr": [0.1, 1.0],
    "weight_decay": [0.0, 3.0],
    "batch_size": 32,
    "epochs": 4.0,
    "iterations": 0,
    "warmup_epochs": 1.0,
    "seed": 3,
    "slice_fraction": 0.1,
    "slice_seed": 0,
}


def images(n: int, seed: int = 0) -> ImageStore:
    return ImageStore.stacked(torch.randint(256, (n, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)))


def source(backbone: Backbone) -> Source:
    return Source("tiny", "random", None, 0, 16, backbone.weights_hash(), None, None, None, backbone)


def one_informative_patch(backbone: Backbone, n: int, seed: int) -> tuple[TokenReader, torch.Tensor]:
    """Every patch claims a class in channel 1, by chance; only the one that stands out in channel 0 is right."""
    generator = torch.Generator().manual_seed(seed)
    y, place = torch.randint(2, (n,), generator=generator), torch.randint(16, (n,), generator=generator)
    x = torch.randn(n, 1, 19, 24, generator=generator)
    x[..., 1] = 4 * torch.randint(2, (n, 1, 19), generator=generator) - 2.0
    x[torch.arange(n), 0, 3 + place, 0] += 6
    x[torch.arange(n), 0, 3 + place, 1] = 4 * y - 2.0
    return TokenReader(backbone, images(n), (-1,), pack(x)), y + 5  # labels need not start at 0


def reference(spec: str, lr: float, decay: float, store: TokenReader, rows: torch.Tensor, targets: torch.Tensor) -> TokenProbe:
    """One probe trained alone, step by step."""
    p = PARAMETERS
    with torch.random.fork_rng():
        torch.manual_seed(p["seed"])
        probe = TokenProbe(ReadoutSpec.parse(spec), 24, 2)
    matrices = [w for w in probe.parameters() if w.ndim > 1]
    vectors = [w for w in probe.parameters() if w.ndim == 1]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95))
    generator, step = torch.Generator().manual_seed(p["seed"]), 0
    per_epoch = len(rows) // 32
    warmup, total = per_epoch, 4 * per_epoch
    for _ in range(4):
        order = rows[torch.randperm(len(rows), generator=generator)]
        for start in range(0, per_epoch * 32, 32):
            batch = order[start : start + 32]
            rate = step / warmup if step < warmup else (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2
            for group in optimizer.param_groups:
                group["lr"] = rate * lr * 32 / 256
            optimizer.zero_grad()
            F.cross_entropy(probe(store.batch(batch)), targets[batch]).backward()
            optimizer.step()
            step += 1
    return probe


@pytest.mark.parametrize("spec", ["abmilp", "ep_cls+gap/pre"])
def test_every_setting_is_a_separate_training_and_the_slice_chooses(backbone: Backbone, spec: str) -> None:
    """The whole protocol written out; the data are so hard that the best on test is another than the chosen one."""
    train, y = one_informative_patch(backbone, 151, seed=11)  # neither 151 nor the 106 without the slice are whole batches
    test, y_test = one_informative_patch(backbone, 100, seed=1)
    held_out = stratified_slice(y, 0.3)
    grid = [(0.1, 0.0), (0.1, 3.0), (1.0, 0.0), (1.0, 3.0)]
    everything = torch.arange(151)
    on_slice, answers = [], []
    for lr, decay in grid:
        probe = reference(spec, lr, decay, train, everything[~held_out], y - 5)
        on_slice.append((probe(train.batch(everything[held_out])).argmax(dim=1) + 5 == y[held_out]).double().mean().item())
        probe = reference(spec, lr, decay, train, everything, y - 5)
        answers.append(probe(test.batch(torch.arange(100))).argmax(dim=1) + 5)
    on_test = [(answer == y_test).double().mean().item() for answer in answers]
    chosen = max(range(4), key=lambda place: on_slice[place])
    assert on_test[chosen] < max(on_test)

    found = run(PARAMETERS, [spec, "gap"], train, y, test, y_test, held_out)[spec]
    assert found.grid is not None
    assert found.grid["slice_accuracy"] == pytest.approx(on_slice)
    assert found.grid["test_accuracy"] == pytest.approx(on_test)
    assert found.selected == {"lr": grid[chosen][0], "weight_decay": grid[chosen][1], "batch_size": 32, "iterations": 16}
    assert found.predictions.tolist() == answers[chosen].tolist()
    assert found.oracle == pytest.approx(max(on_test))
    assert found.parameters == sum(p.numel() for p in probe.parameters())


def test_weights_equal_separate_trainings(backbone: Backbone) -> None:
    train, y = one_informative_patch(backbone, 106, seed=0)
    axes = {"lr": [0.03, 0.3], "weight_decay": [3.0]}
    course = attentive.Course(32, 4.0, 0, 1.0, "iteration", (3,))
    probes = {(spec, 3): attentive._start(spec, 24, 2, axes, 3) for spec in ("map", "cls")}
    attentive.fit(probes, axes, course, train, torch.arange(106), y - 5)
    for (spec, _), of_readout in probes.items():
        for lr, probe in zip(axes["lr"], of_readout, strict=True):
            alone = reference(spec, lr, 3.0, train, torch.arange(106), y - 5)
            for (name, ours), theirs in zip(probe.named_parameters(), alone.parameters(), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_only_attention_finds_the_informative_patch(backbone: Backbone) -> None:
    train, y = one_informative_patch(backbone, 400, seed=0)
    test, y_test = one_informative_patch(backbone, 300, seed=1)
    parameters = {**PARAMETERS, "lr": [0.3], "weight_decay": [0.0], "epochs": 12.0}
    results = run(parameters, ["abmilp", "ep", "gap"], train, y, test, y_test, torch.zeros(400, dtype=torch.bool))
    scores = {spec: (found.predictions == y_test).double().mean().item() for spec, found in results.items()}
    assert min(scores["abmilp"], scores["ep"]) > 0.9
    assert scores["gap"] < 0.75
    assert (results["ep"].grid, results["ep"].oracle, results["ep"].edge_of_grid) == (None, None, None)  # nothing was chosen


def test_selection_never_sees_test_and_other_readouts_change_nothing(backbone: Backbone) -> None:
    train, y = one_informative_patch(backbone, 80, seed=0)
    test, y_test = one_informative_patch(backbone, 60, seed=1)
    held_out = stratified_slice(y, 0.3)
    honest = run(PARAMETERS, ["abmilp"], train, y, test, y_test, held_out)["abmilp"]
    state = torch.get_rng_state()
    other = run(PARAMETERS, ["gap", "abmilp"], train, y, test, 11 - y_test, held_out)["abmilp"]
    assert other.selected == honest.selected
    assert other.predictions.tolist() == honest.predictions.tolist()
    assert honest.grid is not None
    assert other.grid is not None
    assert other.grid["slice_accuracy"] == honest.grid["slice_accuracy"]
    assert other.grid["test_accuracy"] == pytest.approx([1 - value for value in honest.grid["test_accuracy"]])
    assert torch.equal(torch.get_rng_state(), state)


def test_replicates_are_runs_of_other_seeds_and_their_mean_chooses(backbone: Backbone) -> None:
    train, y = one_informative_patch(backbone, 80, seed=0)
    test, y_test = one_informative_patch(backbone, 60, seed=1)
    held_out = stratified_slice(y, 0.3)
    found = run({**PARAMETERS, "probe_seeds": 2}, ["abmilp", "gap"], train, y, test, y_test, held_out)
    for spec, of in found.items():
        alone = [run({**PARAMETERS, "seed": seed}, [spec], train, y, test, y_test, held_out)[spec] for seed in (3, 4)]
        assert of.grid is not None
        for key in ("slice_accuracy", "test_accuracy"):
            values = [other.grid[key] for other in alone if other.grid]
            assert of.grid[key] == pytest.approx([sum(pair) / 2 for pair in zip(*values, strict=True)])
        chosen = {"lr": [of.selected["lr"]], "weight_decay": [of.selected["weight_decay"]]}
        for column, seed in zip(of.predictions.T, (3, 4), strict=True):
            single = run({**PARAMETERS, **chosen, "seed": seed}, [spec], train, y, test, y_test, held_out)[spec]
            assert column.tolist() == single.predictions.tolist()
        assert len(of.selected["accuracy"]) == 2


def test_a_setting_that_diverges_harms_no_other(backbone: Backbone) -> None:
    train, y = one_informative_patch(backbone, 151, seed=0)
    args = (train, y, train, y, stratified_slice(y))
    alone = run({**PARAMETERS, "lr": [0.03]}, ["ep"], *args)["ep"]
    found = run({**PARAMETERS, "lr": [0.03, 1e30]}, ["ep"], *args)["ep"]
    assert found.grid is not None
    assert alone.grid is not None
    assert found.grid["test_accuracy"] == [*alone.grid["test_accuracy"], 0.0, 0.0]
    assert found.grid["slice_accuracy"][2:] == [0.0, 0.0]
    assert found.predictions.tolist() == alone.predictions.tolist()
    with pytest.raises(UsageError, match=r"'ep'.*diverged at the learning rates 1e\+30: give smaller"):
        run({**PARAMETERS, "lr": [1e30]}, ["ep"], *args)


def test_bad_input_is_named(backbone: Backbone) -> None:
    train, y = one_informative_patch(backbone, 40, seed=0)
    with pytest.raises(UsageError, match="all 40 training labels are 5"):
        run(PARAMETERS, ["gap"], train, torch.full_like(y, 5), train, y, stratified_slice(y))
    with pytest.raises(UsageError, match="slice holds 0 of 40"):
        run(PARAMETERS, ["gap"], train, y, train, y, torch.zeros(40, dtype=torch.bool))


def assert_same(ours: Tokens, theirs: Tokens, tolerance: float) -> None:
    for part in ("cls", "registers", "patches"):
        for cached, direct in ((ours, theirs), (ours.normed, theirs.normed)):
            torch.testing.assert_close(getattr(cached, part), getattr(direct, part).detach(), rtol=tolerance, atol=tolerance)


def test_cached_and_streamed_tokens_are_the_backbones(backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, weights = images(300), backbone.weights_hash()
    cached = open_tokens(source(backbone), store, (-1, 0), tmp_path / "new", "key")
    streamed = open_tokens(source(backbone), store, (-1, 0), tmp_path / "none", "key", limit=300 * 2 * 2 * 19 * 24)
    assert cached.packed is not None
    assert streamed.packed is None
    assert len(cached) == len(streamed) == 300
    indices = torch.tensor([299, 0, 256, 255, 0])
    direct = backbone(normalise(store.batch(indices)[0].float() / 255, backbone.mean, backbone.std), blocks=(0, -1))
    assert_same(streamed.batch(indices[:1]), cached.batch(indices[:1]), 1e-3)  # of another company, but rounded alike
    for tokens in (cached.batch(indices), streamed.batch(indices)):
        assert (tokens.block, tokens.depth, tokens.cls.shape[1], tokens.registers.shape[1]) == (2, 3, 1, 2)
        assert_same(tokens, direct, 1e-3)
        assert_same(tokens.at(0), direct.at(0), 1e-3)
        for part in (tokens.patches, tokens.at(0).cls):
            assert torch.equal(part, part.half().float())
        assert not tokens.normed.patches.requires_grad
    (file,) = (tmp_path / "new").iterdir()
    assert file.stat().st_size < 300 * 2 * (2 * 19 * 24 + 2) + 2**17
    assert not (tmp_path / "none").exists() or not list((tmp_path / "none").iterdir())
    assert backbone.weights_hash() == weights

    again = open_tokens(source(backbone), store, (-1, 0), tmp_path / "new", "key", limit=0)
    monkeypatch.setattr(TokenReader, "sequences", None)  # a second evaluation reads the file
    assert_same(again.batch(indices), direct, 1e-3)


def test_an_interrupted_pass_leaves_nothing_that_is_taken_for_complete(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, sequences = images(600), TokenReader.sequences

    def fails_late(self: TokenReader, indices: torch.Tensor) -> torch.Tensor:
        if int(indices[-1]) == 599:
            raise KeyboardInterrupt
        return sequences(self, indices)

    with monkeypatch.context() as patch:
        patch.setattr(TokenReader, "sequences", fails_late)
        with pytest.raises(KeyboardInterrupt):
            open_tokens(source(backbone), store, (-1,), tmp_path, "key")
    cached = open_tokens(source(backbone), store, (-1,), tmp_path, "key")
    indices = torch.tensor([0, 300, 599])
    assert_same(cached.batch(indices), TokenReader(backbone, store, (-1,)).batch(indices), 1e-3)


def test_another_key_or_other_weights_are_another_cache(backbone: Backbone, tmp_path: Path) -> None:
    other = copy.deepcopy(backbone)
    torch.nn.init.normal_(other.vit.pos_embed)
    first = torch.zeros(1, dtype=torch.int64)
    open_tokens(source(backbone), images(3), (-1,), tmp_path, "key")
    for model, seed, key in ((backbone, 1, "other images"), (other, 0, "key")):
        ours = open_tokens(source(model), images(3, seed), (-1,), tmp_path, key)
        assert_same(ours.batch(first), TokenReader(model, images(3, seed), (-1,)).batch(first), 1e-3)


@pytest.mark.parametrize("width", [4, 5])
def test_massive_activations_survive_float16(width: int) -> None:
    x = torch.randn(3, 1, 5, width)
    x[1, 0, 2, 3] = -400_000.0
    x[2] = 0.0
    back = unpack(pack(x), 1, width)
    torch.testing.assert_close(back[0], x[0], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(back[1], x[1], rtol=1e-3, atol=1e-4)
    assert torch.equal(back[2], x[2])


def test_an_image_that_gives_no_numbers_is_named(backbone: Backbone, tmp_path: Path) -> None:
    with torch.no_grad():
        backbone.vit.pos_embed[0, 3, 5] = float("nan")
    with pytest.raises(Failure, match="image 7 gives tokens that are not finite"):
        TokenReader(backbone, images(9), (0,)).batch(torch.tensor([7, 8]))
