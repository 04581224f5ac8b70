"""Protocols: versioned YAML files that say how a frozen backbone is judged, and which module carries each kind out."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from jaxtyping import Bool, Int64
from pydantic import AfterValidator, Field, create_model
from torch import Tensor

from ssl_vit.assets import find_asset, list_assets, read_yaml
from ssl_vit.errors import UsageError, one_of
from ssl_vit_eval.probes import attentive, finetune, knn, linear, logreg, lowshot, mlp
from ssl_vit_eval.probes.selection import Found, stratified_slice
from ssl_vit_eval.schema import STRICT, checked


class Kind(NamedTuple):
    """How a kind of protocol is carried out.

    parameters: every one of them is in the protocol's file, so that the file is the whole rule. reads: pooled `features`, the `tokens`
    of a frozen backbone, or the `images` themselves. joint: all readouts in one run, because that is faster than one after another.
    shared: several processes divide one run; the runs of other kinds are divided among the processes. memory: bytes that a run on so
    many rows of so many features takes beyond a batch, where that grows with the dataset.
    """

    parameters: Mapping[str, Any]
    run: Callable[..., dict[str, Found]]
    reads: str = "features"
    joint: bool = False
    shared: bool = False
    memory: Callable[[int, int], int] | None = None


KINDS = {
    "knn": Kind(knn.PARAMETERS, knn.run, shared=True),
    "logreg": Kind(logreg.PARAMETERS, logreg.run, memory=logreg.memory),
    "linear": Kind(linear.PARAMETERS, linear.run, joint=True),
    "mlp": Kind(mlp.PARAMETERS, mlp.run),
    "lowshot": Kind(lowshot.PARAMETERS, lowshot.run),
    "attentive": Kind(attentive.PARAMETERS, attentive.run, reads="tokens", joint=True),
    "finetune": Kind(finetune.PARAMETERS, finetune.run, reads="images"),
}
OPTIONAL = ("probe_seeds",)  # a file from before there were several has one, and keeps its hash
PRESET = "preset"  # a kind of file that only names others: {protocols: [...]}


def _known_kind(kind: str) -> str:
    if kind not in KINDS and kind != PRESET:
        raise ValueError(f"{kind!r} is unknown; {one_of(kind, [*KINDS, PRESET])}")
    return kind


@dataclass(frozen=True)
class _File:
    """What a protocol's file holds."""

    __pydantic_config__ = STRICT
    version: int
    kind: Annotated[str, AfterValidator(_known_kind)]
    parameters: dict[str, Any]
    deviations: Annotated[tuple[str, ...], Field(description="a list of sentences")] = ()


@dataclass(frozen=True)
class Protocol:
    """A rule: its name, the version that is raised whenever a number could change, its kind (a key of KINDS), its parameters, and
    in what it deviates from the paper that it is named after, a sentence each."""

    name: str
    version: int
    kind: str
    parameters: dict[str, Any]
    deviations: tuple[str, ...] = ()

    @property
    def hash(self) -> str:
        """16 hex digits of what is done."""
        return hashlib.sha256(json.dumps([self.kind, self.parameters], sort_keys=True).encode()).hexdigest()[:16]

    @property
    def reads(self) -> str:
        return KINDS[self.kind].reads

    def held_out(
        self, y: Int64[Tensor, " n"], given: Bool[Tensor, " n"] | None, groups: Int64[Tensor, " n"] | None = None
    ) -> Bool[Tensor, " n"] | Int64[Tensor, " n"]:
        """The selection slice of train: the one given (of a dataset whose images overlap: whole groups of them), else stratified. For a
        kind that selects by folds instead, the group of each image, which no fold may cut; without groups each image is one."""
        if "slice_fraction" not in self.parameters:
            return torch.arange(len(y)) if groups is None else groups
        return stratified_slice(y, self.parameters["slice_fraction"], self.parameters["slice_seed"]) if given is None else given


def load_protocols(names: Sequence[str]) -> list[Protocol]:
    """The protocols of these names or YAML files, presets replaced by what they name, each once. UsageError as `load_protocol`."""
    found: dict[str, Protocol] = {}
    for name in names:
        protocol = load_protocol(name)
        members = protocol.parameters["protocols"] if protocol.kind == PRESET else [name]
        found |= {member.name: member for member in map(load_protocol, members)}
    return list(found.values())


def load_protocol(name: str) -> Protocol:
    """The protocol of this name, or in the YAML file at this path (then named after the file).

    UsageError for an unknown name, an unknown, missing or mistyped key, and for a file that bears the name and the version of
    a protocol that comes with ssl_vit but has other parameters: its rows would pass for those.
    """
    path = find_asset("protocols", name)
    protocol = _read(path.stem, path)
    if protocol.name in list_assets("protocols"):
        shipped = _read(protocol.name, find_asset("protocols", protocol.name))
        if protocol != shipped and protocol.version == shipped.version:
            raise UsageError(f"protocol file {name!r} differs from version {shipped.version} of {shipped.name!r}: rename it")
    return protocol


def _read(name: str, path: Path) -> Protocol:
    content = checked(_File, read_yaml(path), f"protocol {name!r}")
    where = f"protocol {name!r}, parameters"
    types = {"protocols": list} if content.kind == PRESET else KINDS[content.kind].parameters
    fields: dict[str, Any] = {key: (kind, 1 if key in OPTIONAL else ...) for key, kind in types.items()}
    parameters = checked(create_model(content.kind, __config__=STRICT, **fields), content.parameters, where)
    return Protocol(name, content.version, content.kind, parameters.model_dump(exclude_unset=True), content.deviations)
