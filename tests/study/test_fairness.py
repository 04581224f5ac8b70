"""Fair arms: what differs is found, whatever it is, and what may differ does not count."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ssl_vit.errors import UsageError
from ssl_vit.methods import Method
from ssl_vit_eval.study.fairness import Fact, beginning, check_fair, difference, method_of
from ssl_vit_eval.study.plan import Cell, Start

pytestmark = pytest.mark.usefixtures("three_classes")


def cell(recipe: str, readout: str, seed: int = 0, *options: str) -> Cell:
    return Cell(Start(f"{recipe}.yaml", recipe, options, seed), readout, Path("out") / f"{recipe}-{readout}-s{seed}")


@pytest.mark.parametrize(
    ("recipe", "arms"), [("dino", ["cls", "gap", "register", "gap/pre", "ep", "simpool_cls"]), ("mae", ["gap", "cls", "ep"])]
)
def test_arms_that_differ_in_their_readout_alone_are_fair(recipe: str, arms: list[str]) -> None:
    cells = [cell(recipe, arm, seed) for arm in arms for seed in (0, 1)]
    said = check_fair(cells)
    assert f"(cells: {len(cells)}, starts: 2; " in said
    assert "and 19 tokens)" in said  # 16 patches, 2 registers, 1 CLS
    first = method_of(cells[0]).state_dict()
    for other in cells[2::2]:
        state = method_of(other).state_dict()
        assert all(torch.equal(value, state[name]) for name, value in first.items())


def change(parameter: str) -> Callable[[Method], None]:
    def apply(method: Method) -> None:
        with torch.no_grad():
            method.get_parameter(parameter).view(-1)[3] += 1e-6

    return apply


def shift_center(method: Method) -> None:
    method.get_buffer("center")[0] = 1e-6


def add_weight(method: Method) -> None:
    method.more = torch.nn.Linear(2, 2)


def change_crops(method: Method) -> None:
    method.crops = replace(method.crops, global_scale=(0.39, 1.0))  # type: ignore[arg-type, type-var]


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        (change("student.backbone.vit.reg_token"), "student.backbone.vit.reg_token has other values"),
        (change("teacher.head.mlp.4.bias"), "teacher.head.mlp.4.bias has other values"),
        (shift_center, "center has other values"),
        (add_weight, "more.weight is [2, 2], not not there"),
        (change_crops, "its first views has other values"),
        (lambda method: setattr(method, "seed", 1), "seed 0 -> 1"),
        (lambda method: method.recipe["optim"].update(lr=0.03), "optim.lr 0.02 -> 0.03"),
    ],
)
def test_a_planted_difference_is_found(changed: Callable[[Method], None], found: str) -> None:
    arm = method_of(cell("dino", "gap"))
    changed(arm)
    first = beginning(method_of(cell("dino", "cls")))
    assert difference(first, beginning(method_of(cell("dino", "gap")))) == ""
    assert found in difference(first, beginning(arm))


def test_another_token_set_or_width_is_not_fair() -> None:
    first, more = (beginning(method_of(cell("mae", "cls", 0, "--backbone.registers", count))) for count in ("1", "4"))
    assert (first.facts["its sequence"].shown, more.facts["its sequence"].shown) == ("18 tokens", "21 tokens")
    assert "backbone.registers 1 -> 4" in difference(first, more)
    assert "reg_token is [1, 4, 24], not [1, 1, 24]" in difference(first, more._replace(recipe=first.recipe))
    longer = first._replace(facts={**first.facts, "its sequence": Fact("21 tokens")})
    assert difference(first, longer) == "its sequence is 21 tokens, not 18 tokens"
    with pytest.raises(UsageError, match=r"dino, seed 0: the arm cls\+gap is not fair to gap: student.head.mlp.0.weight is \[32, 48\]"):
        check_fair([cell("dino", "gap"), cell("dino", "cls+gap")])
