"""Reversible changes to a live model.

A change is either a child module replaced by another, or a method of one instance overridden. Each carries what undoes
it, outside the parameters, the buffers and the module tree: `state_dict` and `.to()` see only the changed model, while
`copy.deepcopy` and pickle take the originals along, so a copy can be restored on its own.
"""

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import nn

_ORIGINAL = "_fastembed_original"
_WITNESS = "_fastembed_like_original"


class _Original:
    """Holds a replaced module where nn.Module does not look for children; None when it was not kept."""

    def __init__(self, module: nn.Module | None) -> None:
        self.module = module


class _Override(partial[Any]):
    """A method of one instance, bound to it. As a partial it survives deepcopy and pickle bound to the copy."""


class Absorbed(nn.Identity):
    """Stands where a module was whose work another module now does."""

    def __init__(self, by: str) -> None:
        super().__init__()
        self.by = by

    def extra_repr(self) -> str:
        return f"by={self.by!r}"


def replace_child(parent: nn.Module, name: str, replacement: nn.Module, *, keep: bool = True) -> None:
    """Put `replacement` where `parent` has its child `name`.

    With `keep`, the child is remembered, and so are the device and dtype that later `.to()` or `.half()` calls would
    have given it: an empty buffer lives through them in its place.
    """
    original = parent._modules[name]
    assert original is not None
    replacement.train(original.training)
    replacement.__dict__[_ORIGINAL] = _Original(original if keep else None)
    tensor = next((p for p in original.parameters() if p.is_floating_point()), None)
    if keep and tensor is not None:
        replacement.register_buffer(_WITNESS, tensor.detach().new_empty(0), persistent=False)
    parent._modules[name] = replacement


def override_method(module: nn.Module, name: str, function: Callable[..., Any], *bound: Any) -> None:
    """Make `module.name(...)` call `function(module, *bound, ...)`; for pickle, a function importable by name."""
    module.__dict__[name] = _Override(function, module, *bound)


def is_changed(model: nn.Module) -> bool:
    """Whether any change is in place in the model."""
    return any(True for _ in _replacements(model)) or any(True for _ in _overrides(model))


def is_replacement(module: nn.Module) -> bool:
    """Whether a module stands in another's place."""
    return _ORIGINAL in module.__dict__


def keeps_originals(model: nn.Module) -> bool:
    """Whether every replaced module of the model was kept."""
    return all(_original(replacement) is not None for _, _, replacement in _replacements(model))


def original_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and buffers of the modules kept aside."""
    kept = nn.ModuleList(original for *_, new in _replacements(model) if (original := _original(new)) is not None)
    return tensor_bytes(kept)


def restore(model: nn.Module) -> None:
    """Undo every change: the same original modules, on the device and in the dtype that the model has by now."""
    for parent, name, replacement in list(_replacements(model)):
        original = _original(replacement)
        assert original is not None, "the caller checks keeps_originals first"
        witness = getattr(replacement, _WITNESS, None)
        if witness is not None:
            original.to(device=witness.device, dtype=witness.dtype)
        original.train(replacement.training)
        parent._modules[name] = original
    for module, name, _ in list(_overrides(model)):
        del module.__dict__[name]


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """The model without its changes inside the `with` block, and with them again after it."""
    replacements, overrides = list(_replacements(model)), list(_overrides(model))
    restore(model)
    try:
        yield
    finally:
        for parent, name, replacement in replacements:
            parent._modules[name] = replacement
        for module, name, function in overrides:
            module.__dict__[name] = function


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers, each tensor counted once however often it is tied."""
    tensors = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def places(model: nn.Module) -> Iterator[tuple[nn.Module, str, str, nn.Module]]:
    """Every place in the module tree that holds a child: (parent, child's name there, its full name, child).

    A module that stands in several places comes once for each.
    """
    for prefix, parent in model.named_modules():
        for name, child in parent._modules.items():
            if child is not None:
                yield parent, name, f"{prefix}.{name}" if prefix else name, child


def sibling(path: str, name: str) -> str:
    """The full name of what `name` is to the parent of the module at `path`."""
    parent, _, _ = path.rpartition(".")
    return f"{parent}.{name}" if parent else name


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the `with` block.

    Nothing is written to modules that are in it already, so that threads may run a model side by side.
    """
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _replacements(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    for parent, name, _, child in places(model):
        if is_replacement(child):
            yield parent, name, child


def _overrides(model: nn.Module) -> Iterator[tuple[nn.Module, str, _Override]]:
    for module in model.modules():
        for name, value in module.__dict__.items():
            if isinstance(value, _Override):
                yield module, name, value


def _original(replacement: nn.Module) -> nn.Module | None:
    module: nn.Module | None = replacement.__dict__[_ORIGINAL].module
    return module


def reads_weight(parent: type[nn.Module], name: str) -> bool:
    """Whether a module's forward looks at the weight of its child `name` instead of only calling the child.

    Not those that first ask whether it is a tensor (`isinstance(self.wo.weight, torch.Tensor)`): they know of quantised
    layers, which have none.
    """
    return name in _weights_read(parent.forward)


@cache
def _weights_read(forward: Callable[..., Any]) -> frozenset[str]:
    try:
        source = inspect.getsource(forward)
    except (OSError, TypeError):  # no source to read
        return frozenset()
    read = re.findall(r"\bself\.(\w+)\.weight\b", source)
    asked = re.findall(r"isinstance\(\s*self\.(\w+)\.weight\b", source)
    return frozenset(read) - frozenset(asked)


def is_tensor_plain(tensor: torch.Tensor) -> bool:
    """Whether a parameter is an ordinary dense tensor: no tensor subclass, no meta tensor."""
    return type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout == torch.strided and not tensor.is_meta
