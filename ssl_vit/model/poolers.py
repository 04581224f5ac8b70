"""Poolers: what a learned readout does with its tokens, [b n d] -> [b d], one image independent of the others.

The weights over the tokens sum to one, so a projection of the tokens may as well be applied to their weighted mean, and a projection
of the keys to the query: W_V (X a) = (W_V X) a and (W_K x)·q = x·(W_K^T q). Every pooler here is written that way round: it never
projects a token, and costs n·d per query instead of n·d² per image. A bias of the keys moves all scores alike and cancels in the
softmax; there is none, so that the parameters counted are the parameters used.
"""

import torch
from jaxtyping import Float
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

EPS = 1e-6  # of every LayerNorm, as in the backbones
HEAD_WIDTH = 64


class AbMILP(nn.Module):
    """Attention-based multiple-instance pooling (Ilse et al. 2018, section 2.4) with a linear score: the mean of the tokens weighted
    by softmax(w·x). d parameters; papers that count d + 1 have a bias, which cancels in the softmax."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.score = _matrix(1, width)

    def forward(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b d"]:
        return (attention(self.score, tokens) @ tokens)[:, 0]


class EP(nn.Module):
    """Efficient probing (Psomas et al. 2025, section 3): q learned queries on the tokens as they are, and one value projection whose
    j-th slice of d / q channels comes from query j. q is the paper's 32, or the largest number below that divides the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.queries = _matrix(_largest_divisor(width, 32), width)
        self.value = _linear(width, width, bias=False)

    def forward(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b d"]:
        queries = self.queries * tokens.shape[-1] ** -0.5
        return project_slices(attention(queries, tokens) @ tokens, self.value.weight)


class SimPool(nn.Module):
    """SimPool (Psomas et al. 2023, section 3.3): the mean token asks the normed tokens, in one head; their values, shifted to be
    positive, are averaged as a power mean with the paper's exponent for transformers, 1.25. No value projection.

    The shift is the image's own minimum: that of a batch would make an image's vector depend on the others."""

    gamma = 1.25

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.query = _linear(width, width, bias=False)
        self.key = _linear(width, width, bias=False)

    def forward(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b d"]:
        x = self.norm(tokens)
        query = self.query(tokens.mean(dim=1, keepdim=True)) @ self.key.weight * tokens.shape[-1] ** -0.5
        values = (x - x.amin(dim=(1, 2), keepdim=True) + 1e-6) ** self.gamma  # the root of 0 has no finite gradient
        pooled: Tensor = (attention(query, x) @ values)[:, 0] ** (1 / self.gamma)
        return pooled


class MAP(nn.Module):
    """Multi-head attention pooling (Zhai et al. 2022, "Scaling Vision Transformers", section 2.2; SigLIP's head): one learned query
    attends to the tokens, then a residual MLP. Heads of 64 channels where the width allows."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.token = _matrix(1, width)
        self.attention = _OneQueryAttention(width)
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.mlp = _mlp(width)

    def forward(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b d"]:
        z = self.attention.project(attention(self.attention.queries(self.token), tokens) @ tokens)
        out: Tensor = z + self.mlp(self.norm(z))
        return out


class ClassAttention(nn.Module):
    """A class-attention block (CaiT, Touvron et al. 2021, section 3): a learned class token attends to itself and the tokens; attention
    and MLP are residual, each behind its LayerNorm. One block, so without LayerScale, which is there for depth."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.token = _matrix(1, width)
        self.norm1 = nn.LayerNorm(width, eps=EPS)
        self.attention = _OneQueryAttention(width)
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        self.mlp = _mlp(width)

    def forward(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b d"]:
        # norm1's gain goes to the queries and its shift behind the mean, by the same argument as the projections
        gain, shift = self.norm1.weight, self.norm1.bias
        own, x = F.layer_norm(self.token, gain.shape, eps=EPS), F.layer_norm(tokens, gain.shape, eps=EPS)
        queries = self.attention.queries(own * gain + shift) * gain
        scores = torch.cat([(queries @ own.T).expand(len(x), -1, -1), queries @ x.transpose(1, 2)], dim=-1)
        weights = scores.softmax(dim=-1)
        means = weights[..., :1] * own + weights[..., 1:] @ x
        z = self.token + self.attention.project(means * gain + shift)
        out: Tensor = z + self.mlp(self.norm2(z))
        return out


class _OneQueryAttention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017, section 3.2.2) of one query that is the same for all images."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = _largest_divisor(width, width // HEAD_WIDTH)
        self.query = _linear(width, width)
        self.key = _linear(width, width, bias=False)
        self.value = _linear(width, width)
        self.out = _linear(width, width)

    def queries(self, token: Float[Tensor, "1 d"]) -> Float[Tensor, "h d"]:
        """What each head multiplies the tokens with: its part of the query through its keys' projection, scaled."""
        query: Tensor = self.query(token).view(self.heads, 1, -1)
        keys = self.key.weight.view(self.heads, -1, token.shape[-1])
        scaled: Tensor = (query @ keys)[:, 0] * query.shape[-1] ** -0.5
        return scaled

    def project(self, means: Float[Tensor, "b h d"]) -> Float[Tensor, "b d"]:
        """From each head's mean of the tokens to the attention's output."""
        out: Tensor = self.out(project_slices(means, self.value.weight) + self.value.bias)
        return out


def attention(queries: Float[Tensor, "*batch q d"], tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b q n"]:
    """Softmax over the tokens of their dot products with each query; the queries are shared by the images, or each image's own."""
    scores: Tensor = queries @ tokens.transpose(1, 2)
    return scores.softmax(dim=-1)


def project_slices(means: Float[Tensor, "b q d"], weight: Float[Tensor, "d d"]) -> Float[Tensor, "b d"]:
    """The j-th of q equal slices of the projection, applied to the j-th mean; the slices concatenated."""
    return torch.einsum("bqd,qkd->bqk", means, weight.view(means.shape[1], -1, means.shape[2])).flatten(1)


def _largest_divisor(width: int, limit: int) -> int:
    return max(k for k in range(1, max(limit, 1) + 1) if width % k == 0)


def _matrix(rows: int, columns: int) -> nn.Parameter:
    return nn.Parameter(trunc_normal_(torch.empty(rows, columns), std=0.02))


def _linear(inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
    """The start of a ViT's own matrices."""
    layer = nn.Linear(inputs, outputs, bias=bias)
    trunc_normal_(layer.weight, std=0.02)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def _mlp(width: int) -> nn.Sequential:
    return nn.Sequential(_linear(width, 4 * width), nn.GELU(), _linear(4 * width, width))
