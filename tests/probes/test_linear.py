"""Every head of a grid against the same head trained alone with torch.nn and torch.optim; the protocols of the papers."""

import math

import pytest
import torch
from torch import Tensor, nn

from ssl_vit_eval.probes import gradient_descent, linear, mlp
from ssl_vit_eval.protocols import load_protocol
from tests.one_by_one import GRID, LINEAR, MLP, C, N, data, features, one_head, orders, standardised


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the references are, to the last bit."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize(("normalise", "schedule"), [("none", "iteration"), ("standardise", "epoch"), ("batchnorm", "iteration")])
@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_every_head_equals_one_trained_by_torch(normalise: str, schedule: str, momentum: float) -> None:
    p = LINEAR | {"normalise": normalise, "schedule": schedule, "momentum": momentum}
    (A, y), (B, _) = features(N, 6), features(N, 6, seed=1)
    rows = torch.arange(3, N - 2)
    trained = linear.training(p, torch.float64).fit([A, B], rows, y, C)
    logits = trained.heads.logits(gradient_descent.read([A, B], torch.arange(N), trained.standard))
    assert trained.heads.finite().all()
    assert trained.heads.parameters == 6 * C + C
    for r, X in enumerate((A, B)):
        X_train, X_all = standardised(X[rows], X) if normalise == "standardise" else (X[rows], X)
        for g, (lr, weight_decay) in enumerate(GRID):
            reference = one_head(X_train, y[rows], lr, weight_decay, p)
            torch.testing.assert_close(logits[r, g].T, reference(X_all).detach(), atol=1e-8, rtol=1e-8)


def test_lars_equals_a_loop_over_heads() -> None:
    """You et al. 2017 as MAE's probe has it: a weight's gradient is scaled to a thousandth of its norm, then momentum; a bias as in SGD."""
    p = LINEAR | {"optimizer": "lars", "lr": [5.0, 200.0], "warmup_epochs": 1.0}
    (A, y), (B, _) = features(N, 6), features(N, 6, seed=1)
    A, B = A.float().double(), B.float().double()
    trained = linear.training(p, torch.float64).fit([A, B], torch.arange(N), y, C)
    assert isinstance(trained.heads, linear.LinearHeads)
    weights, biases = trained.heads.weight.view(2, 4, C, 6), trained.heads.bias.view(2, 4, C)
    batch_list = [batch for epoch in orders(N, 16, 4) for batch in epoch]
    for r, X in enumerate((A, B)):
        for g, (lr, weight_decay) in enumerate([(lr, weight_decay) for lr in p["lr"] for weight_decay in p["weight_decay"]]):
            W = 0.3 * torch.randn(C, 6, generator=torch.Generator().manual_seed(5)).double()
            b, V, v = torch.zeros(C, dtype=torch.float64), torch.zeros_like(W), torch.zeros(C, dtype=torch.float64)
            for step, batch in enumerate(batch_list):
                epoch = step / 4
                rate = lr * 16 / 256 * (epoch if epoch < 1 else 0.5 * (1 + math.cos(math.pi * (epoch - 1) / 3)))
                residual = ((X[batch] @ W.T + b).softmax(dim=1) - nn.functional.one_hot(y[batch], C)) / 16
                gradient = residual.T @ X[batch] + weight_decay * W
                V = 0.9 * V + gradient * 0.001 * W.norm() / gradient.norm()
                v = 0.9 * v + residual.sum(dim=0)
                W, b = W - rate * V, b - rate * v
            torch.testing.assert_close(weights[r, g], W)
            torch.testing.assert_close(biases[r, g], b)


def test_lars_moves_weights_of_zero_as_sgd_does() -> None:
    X, y = features(N, 6)
    p = LINEAR | {"init_std": 0.0, "momentum": 0.0, "iterations": 1, "epochs": 0.0, "lr": [1.0], "weight_decay": [0.0]}
    sgd_step, lars_step = (
        linear.training(p | {"optimizer": name}, torch.float64).fit([X], torch.arange(N), y, C) for name in ("sgd", "lars")
    )
    torch.testing.assert_close(lars_step.heads.logits(X[None]), sgd_step.heads.logits(X[None]))


def perceptron(X: Tensor, y: Tensor, lr: float, weight_decay: float) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(X.shape[1], 7), nn.GELU(), nn.Linear(7, C)).double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = X.shape[1] if parameter.shape[0] == 7 else 7
            draws = torch.rand(len(parameter), parameter[0].numel(), generator=generator)
            parameter.copy_(((2 * draws - 1) / fan_in**0.5).view_as(parameter))
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=weight_decay)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 15)
    for batch in [batch for epoch in orders(len(X), 16, 10) for batch in epoch][:15]:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X[batch]), y[batch]).backward()
        optimizer.step()
        scheduler.step()
    return model


def test_every_perceptron_equals_one_trained_by_torch() -> None:
    (A, y), (B, _) = features(N, 6), features(N, 6, seed=1)
    trained = mlp.training(MLP, torch.float64).fit([A, B], torch.arange(N), y, C)
    logits = trained.heads.logits(gradient_descent.read([A, B], torch.arange(N), trained.standard))
    for r, X in enumerate((A, B)):
        (X,) = standardised(X)
        for g, (lr, weight_decay) in enumerate([(1e-3, 0.0), (1e-3, 5.0), (3e-2, 0.0), (3e-2, 5.0)]):
            reference = perceptron(X, y, lr, weight_decay)
            torch.testing.assert_close(logits[r, g].T, reference(X).detach(), atol=1e-7, rtol=1e-6)  # the start is drawn in float32
    assert trained.heads.parameters == sum(parameter.numel() for parameter in reference.parameters())


def test_a_perceptron_starts_as_torch_draws_it() -> None:
    weights = mlp.MLPHeads([0], (400, 300, 5), [1.0], [0.0], torch.float32).weights
    for weight, layer in zip(weights[::2], (nn.Linear(400, 300), nn.Linear(300, 5)), strict=True):
        torch.testing.assert_close(weight.abs().max(), layer.weight.abs().max(), rtol=0.01, atol=0)
        torch.testing.assert_close(weight.std(), layer.weight.std(), rtol=0.05, atol=0)


# on ImageNet-1k: optimiser, images a step, steps, the highest rate, and the rate at the middle of the steps relative to it
@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("linear-dino", ("sgd", 1024, 100 * 1251, 0.004, 0.5)),
        ("linear-mae", ("lars", 16384, 90 * 78, 6.4, 0.5 * (1 + math.cos(math.pi * 35 / 80)))),
        ("linear-dinov2", ("sgd", 1024, 12_500, 0.4, 0.5)),
        ("linear", ("sgd", 1024, 5000, 4.0, 0.5)),
    ],
)
def test_presets_are_those_of_the_papers(name: str, facts: tuple[str, int, int, float, float]) -> None:
    protocol = load_protocol(name)
    p = protocol.parameters
    training = linear.training(p)
    n, course = 1_281_167, training.course
    rate = max(training.axes["lr"]) * course.batch(n) / 256
    steps = course.total(n)
    assert (p["optimizer"], course.batch(n), steps, rate, course.rate(steps // 2, n)) == pytest.approx(facts)
    assert p["momentum"] == 0.9
    assert (p["normalise"] == "batchnorm") == (name == "linear-mae")
    assert len(training.axes["lr"]) == {"linear": 13, "linear-dinov2": 13}.get(name, 1)
    assert bool(protocol.deviations) == (name != "linear")


def test_the_mlp_protocol_trains() -> None:
    p = load_protocol("mlp").parameters | {"iterations": 5}
    train, y, test, y_test, held_out = data()
    found = mlp.run(p, train, y, test, y_test, held_out)
    assert found["cls+gap"].parameters == 12 * p["hidden"] + p["hidden"] + p["hidden"] * C + C
    assert found["cls+gap"].predictions.shape == (len(y_test), p["probe_seeds"])
    assert (found["cls+gap"].predictions == y_test[:, None]).double().mean() > 0.5
