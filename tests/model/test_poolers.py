"""Learned readouts against their papers: a loop over images, timm's blocks, and the promises of a fair count of parameters."""

from functools import partial

import pytest
import torch
from timm.layers import AttentionPoolLatent
from timm.models.cait import LayerScaleBlockClassAttn
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

from ssl_vit.model.poolers import EP, EPS, MAP, AbMILP, ClassAttention, SimPool
from ssl_vit.model.readout import READOUTS

PAPERS = [AbMILP, EP, SimPool, MAP, ClassAttention]
POOLERS = list(dict.fromkeys(entry.learned for entry in READOUTS.values() if entry.learned))  # and those that were added
WIDTH = 128  # two heads of 64


def drawn(kind: type[nn.Module], width: int = WIDTH, seed: int = 0) -> nn.Module:
    """With parameters far enough from their start that gains, shifts, biases and sharp attention all show."""
    pooler = kind(width).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in pooler.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.15)
    return pooler


def tokens(b: int = 3, n: int = 7, width: int = WIDTH) -> torch.Tensor:
    return torch.randn(b, n, width, generator=torch.Generator().manual_seed(1)).double() + 0.3


def test_abmilp_is_the_papers() -> None:
    pooler, x = drawn(AbMILP), tokens()
    for image, found in zip(x, pooler(x), strict=True):
        scores = torch.stack([(pooler.score[0] * token).sum() for token in image])
        weights = scores.exp() / scores.exp().sum()
        expected = sum(weight * token for weight, token in zip(weights, image, strict=True))
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("width", "queries"), [(24, 24), (48, 24), (128, 32), (192, 32), (31, 31), (37, 1)])
def test_ep_is_the_papers(width: int, queries: int) -> None:
    """Every token is projected, then slice j is averaged with the weights of query j."""
    pooler, x = drawn(EP, width), tokens(width=width)
    assert pooler.queries.shape == (queries, width)
    size = width // queries
    for image, found in zip(x, pooler(x), strict=True):
        values = [pooler.value.weight @ token for token in image]
        slices = []
        for j, query in enumerate(pooler.queries):
            scores = torch.tensor([(query @ token).item() for token in image], dtype=torch.float64) / width**0.5
            weights = scores.exp() / scores.exp().sum()
            slices.append(sum(w * value[j * size : (j + 1) * size] for w, value in zip(weights, values, strict=True)))
        torch.testing.assert_close(found, torch.cat(slices))


def test_simpool_is_the_papers() -> None:
    pooler, x = drawn(SimPool), tokens()
    gain, shift = pooler.norm.weight, pooler.norm.bias
    for image, found in zip(x, pooler(x), strict=True):
        normed = [(t - t.mean()) / (t.var(correction=0) + EPS).sqrt() * gain + shift for t in image]
        query = pooler.query.weight @ (sum(image) / len(image))
        scores = torch.stack([(pooler.key.weight @ token) @ query for token in normed]) / WIDTH**0.5
        weights = scores.exp() / scores.exp().sum()
        least = min(token.min().item() for token in normed)
        powers = [(token - least + 1e-6) ** 1.25 for token in normed]
        expected = sum(w * power for w, power in zip(weights, powers, strict=True)) ** 0.8
        torch.testing.assert_close(found, expected)


def copy_attention(pooler: nn.Module, q: nn.Linear, k: nn.Linear, v: nn.Linear, out: nn.Linear) -> None:
    for mine, theirs in ((pooler.query, q), (pooler.key, k), (pooler.value, v), (pooler.out, out)):
        theirs.weight.data.copy_(mine.weight)
        if mine.bias is not None:
            theirs.bias.data.copy_(mine.bias)


def copy_mlp(mlp: nn.Module, theirs: nn.Module) -> None:
    for mine, other in ((mlp[0], theirs.fc1), (mlp[2], theirs.fc2)):
        other.load_state_dict(mine.state_dict())


def test_map_is_timms_pool_of_siglip() -> None:
    """With random biases of the keys on timm's side: they cancel."""
    pooler, x = drawn(MAP), tokens()
    theirs = AttentionPoolLatent(WIDTH, num_heads=2, mlp_ratio=4.0, norm_layer=partial(nn.LayerNorm, eps=EPS)).double()
    key, value = nn.Linear(WIDTH, WIDTH).double(), nn.Linear(WIDTH, WIDTH).double()
    copy_attention(pooler.attention, theirs.q, key, value, theirs.proj)
    theirs.kv.weight.data, theirs.kv.bias.data = torch.cat([key.weight, value.weight]).data, torch.cat([key.bias, value.bias]).data
    theirs.latent.data.copy_(pooler.token[None])
    theirs.norm.load_state_dict(pooler.norm.state_dict())
    copy_mlp(pooler.mlp, theirs.mlp)
    torch.testing.assert_close(pooler(x), theirs(x))


def test_class_attention_is_timms_cait_block() -> None:
    pooler, x = drawn(ClassAttention), tokens()
    theirs = LayerScaleBlockClassAttn(
        WIDTH, num_heads=2, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=EPS), init_values=1.0
    ).double()
    copy_attention(pooler.attention, theirs.attn.q, theirs.attn.k, theirs.attn.v, theirs.attn.proj)
    theirs.norm1.load_state_dict(pooler.norm1.state_dict())
    theirs.norm2.load_state_dict(pooler.norm2.state_dict())
    copy_mlp(pooler.mlp, theirs.mlp)
    expected = theirs(x, pooler.token.expand(len(x), 1, -1))[:, 0]
    torch.testing.assert_close(pooler(x), expected)


@pytest.mark.parametrize(("width", "heads"), [(24, 1), (128, 2), (192, 3), (384, 6), (200, 2)])
@pytest.mark.parametrize("kind", [MAP, ClassAttention])
def test_heads_have_64_channels_where_the_width_allows(kind: type[nn.Module], width: int, heads: int) -> None:
    assert kind(width).attention.heads == heads
    assert kind(width)(torch.randn(2, 5, width)).shape == (2, width)


@pytest.mark.parametrize("kind", POOLERS)
def test_an_image_does_not_depend_on_its_batch(kind: type[nn.Module]) -> None:
    pooler, x = drawn(kind), tokens(b=4)
    x[2] *= 10  # the least and greatest values of the batch
    whole = pooler(x)
    assert whole.shape == (4, WIDTH)
    for i in range(4):
        torch.testing.assert_close(pooler(x[i : i + 1]), whole[i : i + 1])  # and the batch dimension stays at b = 1
    torch.testing.assert_close(pooler(x[:, torch.randperm(7)]), whole)  # nor on the order of its tokens


@pytest.mark.parametrize("kind", POOLERS)
def test_counted_parameters_are_used(kind: type[nn.Module]) -> None:
    """Each element of each moves the output, from the very start; what cancels, as a bias of the keys, shows as 1e-16."""
    for pooler in (kind(24).double(), drawn(kind, 24)):
        pooler(tokens(b=16, width=24)).pow(3).sum().backward()
        for name, parameter in pooler.named_parameters():
            assert parameter.grad.abs().min() > 1e-12, name


def test_number_of_parameters() -> None:
    d = 192
    counted = {kind: sum(p.numel() for p in kind(d).parameters()) for kind in PAPERS}
    mlp = 8 * d * d + 5 * d
    attention = 4 * d * d + 3 * d  # no bias of the keys
    assert counted == {
        AbMILP: d,
        EP: 32 * d + d * d,
        SimPool: 2 * d * d + 2 * d,
        MAP: d + attention + 2 * d + mlp,
        ClassAttention: d + 2 * d + attention + 2 * d + mlp,
    }


@pytest.mark.parametrize("kind", POOLERS)
def test_equal_tokens_have_finite_gradients(kind: type[nn.Module]) -> None:
    for x in (torch.ones(2, 5, 24), torch.zeros(2, 5, 24), torch.randn(1, 1, 24).expand(2, 5, 24).clone()):
        pooler = kind(24)
        pooler(x.requires_grad_()).sum().backward()
        assert all(p.grad.isfinite().all() for p in pooler.parameters())
        assert x.grad.isfinite().all()


@pytest.mark.parametrize("kind", POOLERS)
def test_many_settings_at_once(kind: type[nn.Module]) -> None:
    """Stacked parameters under vmap, as the attentive probe may train them: the same values and gradients as one by one."""
    poolers, x = [drawn(kind, 24, seed) for seed in range(3)], tokens(width=24)
    parameters, buffers = stack_module_state(poolers)
    together = vmap(lambda p: functional_call(poolers[0], (p, buffers), (x,)))(parameters)
    together.pow(2).sum().backward()
    for i, pooler in enumerate(poolers):
        out = pooler(x)
        torch.testing.assert_close(together[i], out)
        out.pow(2).sum().backward()
        for name, parameter in pooler.named_parameters():
            torch.testing.assert_close(parameters[name].grad[i], parameter.grad)


def test_every_pooler_is_a_readout_over_patches_and_with_the_class_token() -> None:
    for name, kind in zip(["abmilp", "ep", "simpool", "map", "class_attention"], PAPERS, strict=True):
        assert [(READOUTS[of].learned, READOUTS[of].of) for of in (name, f"{name}_cls")] == [(kind, "patches"), (kind, "cls")]
