"""Protocols: versioned YAML files that say how a frozen backbone is judged, and which module carries each kind out."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import yaml
from jaxtyping import Bool, Int64
from torch import Tensor

from ssl_vit.assets import find_asset, list_assets
from ssl_vit.errors import UsageError, one_of
from ssl_vit_eval.probes import attentive, finetune, knn, linear, logreg, lowshot, mlp
from ssl_vit_eval.probes.selection import Found, stratified_slice


class Kind(NamedTuple):
    """How a kind of protocol is carried out.

    parameters: every one of them is in the protocol's file, so that the file is the whole rule. reads: pooled `features`, the `tokens`
    of a frozen backbone, or the `images` themselves. joint: all readouts in one run, because that is faster than one after another.
    shared: several processes divide one run; the runs of other kinds are divided among the processes.
    """

    parameters: Mapping[str, type]
    run: Callable[..., dict[str, Found]]
    reads: str = "features"
    joint: bool = False
    shared: bool = False


KINDS = {
    "knn": Kind(knn.PARAMETERS, knn.run, shared=True),
    "logreg": Kind(logreg.PARAMETERS, logreg.run),
    "linear": Kind(linear.PARAMETERS, linear.run, joint=True),
    "mlp": Kind(mlp.PARAMETERS, mlp.run),
    "lowshot": Kind(lowshot.PARAMETERS, lowshot.run),
    "attentive": Kind(attentive.PARAMETERS, attentive.run, reads="tokens", joint=True),
    "finetune": Kind(finetune.PARAMETERS, finetune.run, reads="images"),
}
PRESET = "preset"  # a kind of file that only names others: {protocols: [...]}


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

    def held_out(self, y: Int64[Tensor, " n"], given: Bool[Tensor, " n"] | None) -> Bool[Tensor, " n"]:
        """The selection slice of train: the one given (of a set whose images overlap: whole groups of them), else stratified; empty
        for a kind that selects in another way."""
        if "slice_fraction" not in self.parameters:
            return torch.zeros(len(y), dtype=torch.bool)
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
    protocol = _read(path.stem, path.read_text(encoding="utf-8"))
    if protocol.name in list_assets("protocols"):
        shipped_path = find_asset("protocols", protocol.name)
        shipped = _read(protocol.name, shipped_path.read_text(encoding="utf-8"))
        if protocol != shipped and protocol.version == shipped.version:
            raise UsageError(f"protocol file {name!r} differs from version {shipped.version} of {shipped.name!r}: rename it")
    return protocol


def _read(name: str, text: str) -> Protocol:
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"protocol {name!r} is not valid YAML: {' '.join(str(error).split())}") from error
    where = f"protocol {name!r}"
    deviations = content.pop("deviations", []) if isinstance(content, dict) else []
    if not isinstance(deviations, list) or not all(isinstance(item, str) for item in deviations):
        raise UsageError(f"{where} has deviations {deviations!r}: give a list of sentences")
    content = _checked(where, content, {"version": int, "kind": str, "parameters": dict})
    kind = content["kind"]
    if kind not in KINDS and kind != PRESET:
        raise UsageError(f"{where} has the unknown kind {kind!r}: {one_of(kind, [*KINDS, PRESET])}")
    types = {"protocols": list} if kind == PRESET else KINDS[kind].parameters
    return Protocol(name, content["version"], kind, _checked(f"{where}, parameters", content["parameters"], types), tuple(deviations))


def _checked(where: str, content: object, types: Mapping[str, type]) -> dict[str, Any]:
    """`content` if it is a mapping with exactly these keys and types, whole numbers taken as floats where floats are asked."""
    if not isinstance(content, dict):
        raise UsageError(f"{where} is {content!r}: give a mapping with the keys {', '.join(types)}")
    for key in content:
        if key not in types:
            raise UsageError(f"{where} has the unknown key {key!r}: {one_of(str(key), types)}")
    values = {}
    for key, expected in types.items():
        if key not in content:
            raise UsageError(f"{where} lacks the key {key!r}: add it ({expected.__name__})")
        value = content[key]
        values[key] = value = float(value) if expected is float and type(value) is int else value
        if type(value) is not expected:
            # YAML reads 1e-4 as text: it wants 1.0e-4
            raise UsageError(
                f"{where}: {key} is {value!r}, a {type(value).__name__}: give a {expected.__name__} (0.0001 or 1.0e-4, not 1e-4)"
            )
    return values
