"""The linear layers of a model: which may be quantised, which share a weight, and in which block each stands."""

import re
from collections import defaultdict
from collections.abc import Mapping, Set
from dataclasses import dataclass, field

import torch
from torch import nn

from ..integrations import surgery
from .config import QuantConfig, fits

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# Modules from here do more with their linear layers than call them.
_COMPOSITES = ("torch.nn.", "fastembed.nn.")
# The list that a block stands in, and its number there.
_BLOCK = re.compile(r"(?:^|.*?\.)[^\W\d]\w*\.\d+(?=\.)")


@dataclass
class Linear:
    """A linear layer to quantise.

    Attributes:
        name: of its first place in the model.
        module: the layer.
        places: (parent, name there) of everywhere that holds it.
        tied_to: an earlier layer with the same weight and bias, or None.
    """

    name: str
    module: nn.Linear
    places: list[tuple[nn.Module, str]] = field(default_factory=list)
    tied_to: "Linear | None" = None


@dataclass
class Layers:
    """What `find_layers` found.

    Attributes:
        chosen: the layers to quantise, in the model's order.
        left: name -> why it stays as it is; also other modules with matrices of their own.
        owners: id of a parameter -> the modules that hold it.
    """

    chosen: list[Linear]
    left: dict[str, str]
    owners: dict[int, list[nn.Module]]

    @property
    def weights(self) -> list[Linear]:
        """One layer for every weight: the first of those that are tied."""
        return [layer for layer in self.chosen if layer.tied_to is None]

    @property
    def by_weight(self) -> list[list[nn.Linear]]:
        """For every weight, all modules that have it."""
        return [
            [layer.module for layer in self.chosen if layer is first or layer.tied_to is first]
            for first in self.weights
        ]


def find_layers(model: nn.Module, config: QuantConfig, inside: Set[nn.Module] = frozenset()) -> Layers:
    """The layers of a model that the configuration quantises, but for those `inside` of what is replaced as a whole.

    Raises:
        ValueError: a pattern fits no linear layer.
    """
    linears: dict[int, Linear] = {}
    for parent, name, path, child in surgery.places(model):
        if isinstance(child, nn.Linear):
            linears.setdefault(id(child), Linear(path, child)).places.append((parent, name))
    for argument in ("skip", "bits", "importance", "activations"):
        patterns = getattr(config, argument)
        for pattern in patterns if isinstance(patterns, tuple | Mapping) else ():
            if not any(fits(pattern, linear.name) for linear in linears.values()):
                raise ValueError(f"{argument} must fit linear layers of the model, but {pattern!r} fits none")
    found = Layers([], {}, _owners_of_tensors(model))
    first: dict[tuple[int, int], Linear] = {}
    for linear in linears.values():
        if linear.module in inside:
            continue
        if (why := _why_left(linear, config, found.owners)) is not None:
            found.left[linear.name] = why
            continue
        key = (id(linear.module.weight), id(linear.module.bias))
        linear.tied_to = first.get(key)
        first.setdefault(key, linear)
        found.chosen.append(linear)
    found.left.update(
        (name, f"weights of a {type(module).__name__}, not of an nn.Linear")
        for name, module in model.named_modules()
        if module not in inside and _multiplies_otherwise(module)
    )
    return found


def block_of(name: str) -> str | None:
    """The name of the outermost numbered block that holds a layer, such as "encoder.layer.3", or None."""
    # A sentence-transformers model numbers its modules, too, but they stand in no list with a name.
    found = _BLOCK.match(name)
    return None if found is None else found.group()


def _multiplies_otherwise(module: nn.Module) -> bool:
    """Whether a module of others' making has matrices of its own: GPT-2's Conv1D, experts side by side."""
    base = next(kind for kind in type(module).__mro__ if kind.__module__.startswith("torch.nn."))
    matrices = [p for p in module._parameters.values() if p is not None and p.dim() > 1 and min(p.shape) > 1]
    return base is nn.Module and not type(module).__module__.startswith(_COMPOSITES) and bool(matrices)


def _owners_of_tensors(model: nn.Module) -> dict[int, list[nn.Module]]:
    owners = defaultdict(list)
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)].append(module)
    return owners


def _why_left(linear: Linear, config: QuantConfig, owners: dict[int, list[nn.Module]]) -> str | None:
    """Why a linear layer stays as it is, or None when it is to be quantised."""
    module = linear.module
    if config.skips(linear.name):
        return "skip"
    if config.avg_bits is None and config.bits_of(linear.name) is None:
        return "no pattern of bits"
    if type(module) is not nn.Linear:
        return f"a {type(module).__name__}, not a plain nn.Linear"
    for parent, name in linear.places:
        composite = type(parent).__module__.startswith(_COMPOSITES) and not isinstance(parent, _CONTAINERS)
        if composite or surgery.reads_weight(type(parent), name):
            return f"{type(parent).__name__} reads its weights itself"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "it has hooks"
    if not surgery.is_tensor_plain(module.weight):
        return f"its weight is a {type(module.weight).__name__} on {module.weight.device}"
    if module.weight.dtype not in FLOAT_DTYPES:
        return f"its weight is {module.weight.dtype}"
    if not module.weight.numel():
        return "it is empty"
    for owner in owners[id(module.weight)]:
        if type(owner) is not nn.Linear or owner.weight is not module.weight:
            return f"its weight is tied to the model's {type(owner).__name__}"
        if owner.bias is not module.bias:
            return "its weight is tied to a layer with another bias"
    return None
