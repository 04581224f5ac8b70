"""The readout spec: its grammar, what each placement of the norm means, and that READOUTS alone decides what exists."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ssl_vit.errors import UsageError
from ssl_vit.model.backbone import Backbone, build_backbone
from ssl_vit.model.readout import READOUTS, Entry, ReadoutSpec, available, cls_and_patches, patches, readout
from ssl_vit.model.tokens import Tokens
from tests.conftest import TINY

IMAGES = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("text", "canonical", "slug", "blocks", "width"),
    [
        ("cls", "cls", "cls", (-1,), 1),
        ("cls@last1/post", "cls", "cls", (-1,), 1),
        ("gap/pre", "gap/pre", "gap-pre", (-1,), 1),
        ("register1/pooled", "register1/pooled", "register1-pooled", (-1,), 1),
        ("cls@last3+gap", "cls@last3+gap", "cls-last3.gap", (-3, -2, -1), 4),
        ("gap@block0/pre+cls/pooled", "gap@block0/pre+cls/pooled", "gap-block0-pre.cls-pooled", (-1, 0), 2),
        ("class_attention_cls@last2/post+max", "class_attention_cls@last2+max", "class_attention_cls-last2.max", (-2, -1), 3),
    ],
)
def test_grammar(text: str, canonical: str, slug: str, blocks: tuple[int, ...], width: int) -> None:
    spec = ReadoutSpec.parse(text)
    assert (str(spec), spec.slug, spec.blocks, spec.width(1)) == (canonical, slug, blocks, width)
    assert ReadoutSpec.parse(canonical) == spec


@pytest.mark.parametrize(
    ("text", "last", "norm", "at_post", "at_block"),
    [
        ("cls", True, "post", "cls", "cls@block2"),
        ("cls@last4/pre", True, "pre", "cls@last4", "cls@block2/pre"),
        ("gap@block1+cls@block1/pooled", False, None, "gap@block1+cls@block1", "gap@block2+cls@block2/pooled"),
        ("cls@last4+gap", True, "post", "cls@last4+gap", "None"),
    ],
)
def test_questions_about_blocks_and_norms(text: str, last: bool, norm: str | None, at_post: str, at_block: str) -> None:
    spec = ReadoutSpec.parse(text)
    assert (spec.of_last_blocks, spec.norm, str(spec.with_norm("post")), str(spec.at_block(2))) == (last, norm, at_post, at_block)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("clss", "did you mean 'cls'"),
        ("", "unknown readout ''"),
        ("CLS", "unknown readout 'CLS'"),
        ("cls+", "unknown readout ''"),
        ("cls+cls/post", "names 'cls' twice"),
        ("cls/prenorm", "cannot be read at 'cls/prenorm'"),
        ("cls@last0", "last 0 blocks"),
        ("cls@3", "cannot be read"),
        ("gap0", "reads all patches"),
        ("ep_cls0", "reads all patches"),
        ("ep_", "did you mean 'ep'"),
        ("map_class", "did you mean 'map_cls'"),
        ("cls 0", "cannot be read"),
    ],
)
def test_bad_spec_is_one_clear_line(text: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        ReadoutSpec.parse(text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("register2", "needs registers > 2, got 2"),
        ("cls1", "needs cls tokens > 1, got 1"),
        ("gap@block3", "the depth is 3 blocks; choose @block0 to @block2"),
        ("cls@last4", "the depth is 3 blocks; choose @last1 to @last3"),
    ],
)
def test_what_the_model_lacks_is_refused(backbone: Backbone, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        backbone.check(ReadoutSpec.parse(text))


def test_register_without_registers_names_what_to_change() -> None:
    with pytest.raises(UsageError) as error:
        ReadoutSpec.parse("register").check(cls=1, registers=0, depth=12)
    there = ", ".join(name for name, entry in READOUTS.items() if entry.of != "registers" and not entry.learned)
    assert str(error.value) == f"readout 'register' needs registers > 0, got 0; set backbone.registers or choose one of: {there}"


def test_learned_readouts_with_cls_need_one() -> None:
    assert [*available(1, 2), *available(1, 2, learned=True)] == sorted(READOUTS, key=lambda name: READOUTS[name].learned is not None)
    for name, entry in READOUTS.items():
        with_parameters = entry.learned is not None
        assert [name in available(*have, with_parameters) for have in ((0, 4), (1, 0))] == [
            entry.of != "cls",
            entry.of != "registers",
        ]
    assert (READOUTS["ep"].of, READOUTS["ep_cls"].of) == ("patches", "cls")
    with pytest.raises(UsageError) as error:
        ReadoutSpec.parse("cls+ep_cls").check(cls=0, registers=4, depth=12, change="timm:x")
    assert "'cls' needs cls tokens > 0" in str(error.value)
    with pytest.raises(UsageError, match="readout 'ep_cls' needs cls tokens > 0, got 0; choose one of: gap, register, "):
        ReadoutSpec.parse("ep+ep_cls").check(cls=0, registers=4, depth=12, change="timm:x")


def test_values_by_hand(backbone: Backbone) -> None:
    """Against timm's own forward, sliced by hand: CLS, then registers, then patches."""
    torch.nn.init.uniform_(backbone.norm.weight)  # so that the order of norm and mean matters
    with torch.no_grad():
        raw = backbone.vit.forward_intermediates(
            IMAGES, indices=[0, 2], return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
        )
        (first, first_prefix), (last, prefix) = raw
        norm = backbone.norm
        expected = {
            "cls": norm(prefix[:, 0]),
            "gap": norm(last).mean(1),
            "gap/pre": last.mean(1),
            "gap/pooled": norm(last.mean(1)),
            "register": norm(prefix[:, 1:3]).mean(1),
            "register1": norm(prefix[:, 2]),
            "cls+gap": torch.cat([norm(prefix[:, 0]), norm(last).mean(1)], dim=1),
            "cls@block0": norm(first_prefix[:, 0]),
            "gap@block0/pre": first.mean(1),
            "max": norm(last).amax(1),
            "max/pooled": norm(last.amax(1)),
            "gem": generalised_mean(norm(last)),
            "gem@block0/pre": generalised_mean(first),
        }
        for text, value in expected.items():
            spec = ReadoutSpec.parse(text)
            torch.testing.assert_close(readout(text)(backbone(IMAGES, blocks=spec.blocks)), value, rtol=0, atol=1e-6)
        assert (expected["gap"] - expected["gap/pooled"]).abs().max() > 1e-3


def generalised_mean(patches: torch.Tensor) -> torch.Tensor:
    """The definition, p = 3, per image and channel on the values above their minimum."""
    out = np.empty((patches.shape[0], patches.shape[2]))
    for image, values in enumerate(patches.double().numpy()):
        for channel in range(values.shape[1]):
            shifted = [value - min(values[:, channel]) for value in values[:, channel]]
            out[image, channel] = min(values[:, channel]) + np.mean([value**3 for value in shifted]) ** (1 / 3)
    return torch.from_numpy(out).float()


def test_gem_of_equal_patches_has_a_finite_gradient(backbone: Backbone) -> None:
    tokens = backbone(IMAGES)
    for values in (torch.full((5, 16, 24), -2.0), torch.zeros(5, 16, 24)):
        tokens = replace(tokens, patches=values.requires_grad_())
        out = readout("gem/pre")(tokens)
        out.sum().backward()
        torch.testing.assert_close(out, values[:, 0], rtol=0, atol=2e-6)
        assert values.grad is not None
        assert values.grad.isfinite().all()


LEARNED = [name for name, entry in READOUTS.items() if entry.learned and entry.read in (patches, cls_and_patches)]


@pytest.mark.parametrize("name", LEARNED)
def test_which_tokens_a_learned_readout_reads_and_where_it_norms(backbone: Backbone, name: str) -> None:
    """Its module on tokens cut out by hand: patches, where it reads CLS too the class token before them, and never a register."""
    torch.nn.init.uniform_(backbone.norm.weight)
    with torch.no_grad():
        tokens = backbone(IMAGES, blocks=(0, 2))
        for text, block, outer, inner in (
            (name, 2, torch.nn.Identity(), backbone.norm),
            (f"{name}@block0/pre", 0, torch.nn.Identity(), torch.nn.Identity()),
            (f"{name}/pooled", 2, backbone.norm, torch.nn.Identity()),
        ):
            read = readout(text, 24)
            raw = tokens.at(block)
            x = inner(torch.cat([raw.cls, raw.patches], dim=1) if READOUTS[name].of == "cls" else raw.patches)
            (pooler,) = read.poolers[text]
            torch.testing.assert_close(read(tokens), outer(pooler(x)), rtol=0, atol=1e-6)
        other = replace(tokens, registers=tokens.registers + 1)
        assert read(other).shape == (5, 24)
        assert torch.equal(read(other), read(tokens))


def test_terms_and_blocks_have_parameters_of_their_own(backbone: Backbone) -> None:
    read = readout("cls+ep@last2+ep/pre", 24)
    assert sorted({name.rpartition(".")[0] for name, _ in read.named_parameters()}) == [
        "poolers.ep/pre.0",
        "poolers.ep/pre.0.value",
        "poolers.ep@last2.0",
        "poolers.ep@last2.0.value",
        "poolers.ep@last2.1",
        "poolers.ep@last2.1.value",
    ]
    tokens = backbone(IMAGES, blocks=read.spec.blocks)
    (shallow, deep), (raw,) = read.poolers["ep@last2"], read.poolers["ep/pre"]
    normed = [backbone.norm(tokens.at(block).patches) for block in (-2, -1)]
    expected = torch.cat([backbone.norm(tokens.cls[:, 0]), shallow(normed[0]), deep(normed[1]), raw(tokens.patches)], dim=1)
    torch.testing.assert_close(read(tokens), expected)


def test_a_learned_readout_needs_the_width() -> None:
    assert [ReadoutSpec.parse(text).learned for text in ("cls+gem", "cls+ep", "abmilp")] == [False, True, True]
    with pytest.raises(UsageError) as error:
        readout("cls+ep")
    assert str(error.value) == "readout 'cls+ep' has parameters and needs the tokens' width: readout('cls+ep', backbone.width)"
    assert readout("cls+gem@last2").state_dict() == {}


def test_last_n_goes_from_shallow_to_deep(backbone: Backbone) -> None:
    tokens = backbone(IMAGES, blocks=(-3, -2, -1))
    assert torch.equal(readout("cls@last3")(tokens), torch.cat([readout(f"cls@block{k}")(tokens) for k in range(3)], dim=1))


def test_a_block_that_was_not_kept_is_an_error(backbone: Backbone) -> None:
    with pytest.raises(KeyError, match="block 0 was not kept, only \\[2\\]"):
        readout("cls@block0")(backbone(IMAGES))


def test_reading_normed_tokens_through_the_norm_again_is_an_error(backbone: Backbone) -> None:
    with pytest.raises(ValueError, match="through the final norm already"):
        readout("gap/pooled")(backbone(IMAGES).normed)


def test_a_new_readout_is_one_function_and_one_entry(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    def strongest(tokens: Tokens) -> torch.Tensor:
        return tokens.patches.amax(dim=1)

    monkeypatch.setitem(READOUTS, "strongest", Entry(strongest, of="patches"))
    tokens = backbone(IMAGES)
    assert torch.equal(readout("strongest")(tokens), backbone.norm(tokens.patches).amax(dim=1))
    assert readout("cls+strongest@last2/pre")(backbone(IMAGES, blocks=(-2, -1))).shape == (5, 72)


def test_one_register_and_cls_are_exchangeable() -> None:
    """The study's null control: with one register and no positions for either, swapping the two tokens swaps the two readouts."""
    model = build_backbone(replace(TINY, registers=1)).eval()
    before = model(IMAGES)
    with torch.no_grad():
        kept = model.vit.cls_token.clone()
        model.vit.cls_token.copy_(model.vit.reg_token)
        model.vit.reg_token.copy_(kept)
    after = model(IMAGES)
    torch.testing.assert_close(after.cls, before.registers, rtol=0, atol=1e-5)
    torch.testing.assert_close(after.registers, before.cls, rtol=0, atol=1e-5)
