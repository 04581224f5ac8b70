"""Readouts: which token carries the image, as one string with one grammar.

    SPEC   = TERM ("+" TERM)*                    concatenated:  cls+gap
    TERM   = NAME [INDEX] ["@" BLOCKS] ["/" NORM]
    NAME   = a key of READOUTS, [a-z0-9_]        INDEX selects one of several tokens: cls0, register2
    BLOCKS = lastN | blockK                      lastN concatenates, shallow to deep; blockK counts from 0
    NORM   = post | pre | pooled                 post (default): final norm on each token, then pool; pre: raw tokens;
                                                 pooled: pool, then norm. Every block is read through the *final* norm.

To add a readout, write one function from Tokens to [b d] and one line of READOUTS; the CLI, recipes, probes and tests pick it up.
One with parameters is a module from [b n d] to [b d] (poolers.py), and its line stands in LEARNED. docs/extend.md shows both.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ssl_vit.errors import UsageError, one_of
from ssl_vit.model.poolers import EP, MAP, AbMILP, ClassAttention, SimPool
from ssl_vit.model.tokens import Tokens


def cls(tokens: Tokens) -> Float[Tensor, "b d"]:
    """The class token; the mean of them where there are several."""
    return tokens.cls.mean(dim=1)


def gap(tokens: Tokens) -> Float[Tensor, "b d"]:
    """Global average pooling over the patch tokens only."""
    return tokens.patches.mean(dim=1)


def register(tokens: Tokens) -> Float[Tensor, "b d"]:
    """The mean of the register tokens."""
    return tokens.registers.mean(dim=1)


def channel_max(tokens: Tokens) -> Float[Tensor, "b d"]:
    """The maximum of each channel over the patch tokens."""
    return tokens.patches.amax(dim=1)


def gem(tokens: Tokens) -> Float[Tensor, "b d"]:
    """Generalised mean over the patch tokens with p = 3 (Radenovic et al. 2018, equation 3), above each channel's minimum in the image:
    the power needs values of one sign, and clamping instead would drop half of a LayerNorm's output."""
    x = tokens.patches.float()  # cubes leave half precision's range
    least = x.amin(dim=1, keepdim=True)
    cubes = (x - least).pow(3).mean(dim=1).clamp(min=1e-18)  # the root of 0, where all patches agree, has no finite gradient
    return least[:, 0] + cubes ** (1 / 3)


def patches(tokens: Tokens) -> Float[Tensor, "b n d"]:
    return tokens.patches


def cls_and_patches(tokens: Tokens) -> Float[Tensor, "b n d"]:
    return torch.cat([tokens.cls, tokens.patches], dim=1)


class Entry(NamedTuple):
    read: Callable[[Tokens], Tensor]  # [b d], or the [b n d] that go into `learned`
    of: str  # the field of Tokens it reads: what must not be empty, and what an index selects from
    learned: Callable[[int], nn.Module] | None = None  # from the width to the module with its parameters

    @property
    def indexed(self) -> bool:
        return self.of != "patches" and self.learned is None


READOUTS: dict[str, Entry] = {
    "cls": Entry(cls, of="cls"),
    "gap": Entry(gap, of="patches"),
    "register": Entry(register, of="registers"),
    "max": Entry(channel_max, of="patches"),
    "gem": Entry(gem, of="patches"),
}
LEARNED = {"abmilp": AbMILP, "ep": EP, "simpool": SimPool, "map": MAP, "class_attention": ClassAttention}
for _name, _module in LEARNED.items():  # on the patches, and with CLS among them
    READOUTS[_name] = Entry(patches, of="patches", learned=_module)
    READOUTS[f"{_name}_cls"] = Entry(cls_and_patches, of="cls", learned=_module)


def check_names(table: dict[str, Entry]) -> None:
    """UsageError for a name that could be registered, but not used: the grammar would cut it elsewhere."""
    for name in table:
        base = name.rstrip("0123456789")
        if not re.fullmatch(r"[a-z_][a-z0-9_]*", name) or (base != name and base in table and table[base].indexed):
            raise UsageError(f"READOUTS holds {name!r}: a name has a-z, 0-9 and _, begins with no digit, and is no other's with an index")


check_names(READOUTS)

_TERM = re.compile(r"(?P<head>[a-z0-9_]+)(?:@(?P<kind>last|block)(?P<count>\d+))?(?:/(?P<norm>post|pre|pooled))?")
_SHAPE = "NAME[INDEX][@lastN|@blockK][/post|/pre|/pooled], joined by '+', e.g. cls, gap/pre, register2, cls@last4+gap"


@dataclass(frozen=True)
class Term:
    name: str
    index: int | None = None
    blocks: tuple[int, ...] = (-1,)  # negative: from the last block
    norm: str = "post"

    def __str__(self) -> str:
        at = "" if self.blocks == (-1,) else f"@block{self.blocks[0]}" if self.blocks[0] >= 0 else f"@last{len(self.blocks)}"
        return self.name + ("" if self.index is None else str(self.index)) + at + ("" if self.norm == "post" else f"/{self.norm}")

    def read(self, tokens: Tokens, poolers: Iterable[nn.Module]) -> Float[Tensor, "b width"]:
        return torch.cat([self._read(tokens.at(block), pool) for block, pool in zip(self.blocks, poolers, strict=True)], dim=-1)

    def _read(self, tokens: Tokens, pool: nn.Module) -> Float[Tensor, "b d"]:
        source = tokens.normed if self.norm == "post" else tokens
        entry = READOUTS[self.name]
        if self.index is not None:
            source = replace(source, **{entry.of: getattr(source, entry.of)[:, self.index : self.index + 1]})
        pooled: Tensor = pool(entry.read(source))
        return tokens.norm(pooled) if self.norm == "pooled" else pooled


@dataclass(frozen=True)
class ReadoutSpec:
    """A parsed readout spec. `str(spec)` is its canonical form: `cls@last1/post` is `cls`."""

    terms: tuple[Term, ...]

    @classmethod
    def parse(cls, text: str) -> "ReadoutSpec":
        """Raises UsageError, in one line, for anything that the grammar does not hold."""
        terms = tuple(_parse_term(term, text) for term in text.split("+"))
        for term in terms:
            if terms.count(term) > 1:
                raise UsageError(f"readout {text!r} names {str(term)!r} twice; name each term once")
        return cls(terms)

    def __str__(self) -> str:
        return "+".join(map(str, self.terms))

    @property
    def slug(self) -> str:
        """For file names and logger keys: no '/', '@' or '+'; different specs have different slugs."""
        return str(self).replace("/", "-").replace("@", "-").replace("+", ".")

    @property
    def blocks(self) -> tuple[int, ...]:
        """The blocks it reads, for `backbone(images, blocks=spec.blocks)`."""
        return tuple(sorted({block for term in self.terms for block in term.blocks}))

    @property
    def uses_norm(self) -> bool:
        """False when every term is `/pre`: the final norm then gets no gradient from this readout."""
        return any(term.norm != "pre" for term in self.terms)

    @property
    def learned(self) -> bool:
        """True when some term has parameters: the spec alone is then not the whole readout."""
        return any(READOUTS[term.name].learned for term in self.terms)

    @property
    def parts(self) -> tuple["ReadoutSpec", ...]:
        """What it concatenates, each of one token's width, in the order of its columns: every term at every one of its blocks."""
        return tuple(ReadoutSpec((replace(term, blocks=(block,)),)) for term in self.terms for block in term.blocks)

    @property
    def of_last_blocks(self) -> bool:
        """True when its blocks are counted from the last one, as in `cls` and `cls@last4`; `cls@block3` is for curves over the depth."""
        return all(block < 0 for block in self.blocks)

    @property
    def norm(self) -> str | None:
        """Where the final norm stands in every term; None where terms differ."""
        norms = {term.norm for term in self.terms}
        return norms.pop() if len(norms) == 1 else None

    def with_norm(self, norm: str) -> "ReadoutSpec":
        """The same readout with the final norm at this place in every term."""
        return ReadoutSpec(tuple(replace(term, norm=norm) for term in self.terms))

    def at_block(self, block: int) -> "ReadoutSpec | None":
        """The same readout of this block alone, -1 for the last; None where terms read different blocks."""
        same = len({term.blocks for term in self.terms}) == 1
        return ReadoutSpec(tuple(replace(term, blocks=(block,)) for term in self.terms)) if same else None

    def width(self, token_width: int) -> int:
        return token_width * sum(len(term.blocks) for term in self.terms)

    def check(self, cls: int, registers: int, depth: int, change: str = "backbone") -> None:
        """Raise UsageError unless a model with so many class tokens, registers and blocks can be read this way.

        change: what the user can change, for the message (`backbone` of a recipe, or a checkpoint's name)."""
        have = {"cls": cls, "registers": registers, "patches": 1}
        for term in self.terms:
            of = READOUTS[term.name].of
            needs = f"cls tokens > {term.index or 0}" if of == "cls" else f"{of} > {term.index or 0}"
            if have[of] <= (term.index or 0):
                setting = {"cls": "cls_tokens", "registers": "registers"}[of]
                possible = available(cls, registers)
                advice = f"set backbone.{setting} or " if change == "backbone" else ""
                raise UsageError(f"readout {str(term)!r} needs {needs}, got {have[of]}; {advice}choose one of: {', '.join(possible)}")
            if not -depth <= term.blocks[0] < depth:
                allowed = f"@block0 to @block{depth - 1}" if term.blocks[0] >= 0 else f"@last1 to @last{depth}"
                raise UsageError(f"readout {str(term)!r} reads more than there is: the depth is {depth} blocks; choose {allowed}")


def available(cls: int, registers: int, learned: bool = False) -> list[str]:
    """The readouts of a model with so many class tokens and registers: those without parameters, or the learned ones."""
    have = {"cls": cls, "registers": registers, "patches": 1}
    return [name for name, entry in READOUTS.items() if have[entry.of] and (entry.learned is not None) == learned]


def _parse_term(text: str, spec: str) -> Term:
    match = _TERM.fullmatch(text)
    head = re.split(r"[^a-z0-9_]", text)[0]
    name = head if head in READOUTS else head.rstrip("0123456789")
    if name not in READOUTS:
        wrong = re.split(r"[@/+]", text)[0]
        raise UsageError(f"unknown readout {wrong!r} in {spec!r}; {one_of(wrong, READOUTS)}")
    if match is None:
        raise UsageError(f"readout {spec!r} cannot be read at {text!r}; it is written {_SHAPE}")
    count = int(match["count"]) if match["count"] else 1
    if match["kind"] == "last" and count == 0:
        raise UsageError(f"readout {spec!r} asks for the last 0 blocks; write @last1 or more")
    index = int(head.removeprefix(name)) if head != name else None
    if index is not None and not READOUTS[name].indexed:
        raise UsageError(f"readout {spec!r} selects one of {name!r}, which reads all patches; an index goes with cls or register")
    blocks = (count,) if match["kind"] == "block" else tuple(range(-count, 0))
    return Term(name, index, blocks, match["norm"] or "post")


class Readout(nn.Module):
    """Reads Tokens as a spec says. A Module, so that readouts with parameters are saved and trained like the rest.

    >>> readout("cls+gap")(backbone(images))                  # [b 2d]
    >>> readout("ep_cls", backbone.width)(backbone(images))   # [b d], from freshly drawn parameters

    width: of a token; needed by a spec with learned terms only, UsageError without it.
    """

    def __init__(self, spec: ReadoutSpec, width: int | None = None) -> None:
        super().__init__()
        if spec.learned and width is None:
            raise UsageError(f"readout {str(spec)!r} has parameters and needs the tokens' width: readout({str(spec)!r}, backbone.width)")
        self.spec = spec
        self.poolers = nn.ModuleDict()
        for term in spec.terms:  # one for each block; without parameters unless the readout is learned
            learned = READOUTS[term.name].learned or (lambda _: nn.Identity())
            self.poolers[str(term)] = nn.ModuleList([learned(cast(int, width)) for _ in term.blocks])

    def forward(self, tokens: Tokens) -> Float[Tensor, "b width"]:
        return torch.cat([term.read(tokens, cast(nn.ModuleList, self.poolers[str(term)])) for term in self.spec.terms], dim=-1)


def readout(spec: str | ReadoutSpec, width: int | None = None) -> Readout:
    """The readout that a spec names; UsageError if it names none, or a learned one without the token width."""
    return Readout(spec if isinstance(spec, ReadoutSpec) else ReadoutSpec.parse(spec), width)
