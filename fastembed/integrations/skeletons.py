"""Models without weights, written and built by the library that they are of."""

import threading
from collections.abc import Iterator, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..nn import QuantLinear
from . import surgery

_building = threading.Lock()


def write_skeleton(model: nn.Module, library: str, folder: Path, poolings: Set[str]) -> None:
    """What the library builds the model from: all that its own saving writes, but no weights of transformers models."""
    if library == "torch":
        return
    from transformers import PreTrainedModel

    encoders = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    # sentence-transformers' Dense and the like.
    projections = [
        module
        for module in model.modules()
        if hasattr(type(module), "save_torch_weights") and any(isinstance(m, QuantLinear) for m in module.children())
    ]
    # A swapped model's own methods write the original instead.
    overridden = [
        (module, name, module.__dict__.pop(name))
        for module in model.modules()
        for name in ("save", "save_pretrained")
        if name in module.__dict__
    ]
    try:
        for encoder in encoders:
            encoder.__dict__["save_pretrained"] = _ConfigOnly(encoder)
        for projection in projections:
            projection.__dict__["save_torch_weights"] = _nothing
        with _plain_poolings(model, poolings):
            model.save_pretrained(str(folder))  # type: ignore[operator]
    finally:
        for encoder in encoders:
            encoder.__dict__.pop("save_pretrained", None)
        for projection in projections:
            projection.__dict__.pop("save_torch_weights", None)
        for module, name, method in overridden:
            module.__dict__[name] = method


@contextmanager
def _plain_poolings(model: nn.Module, names: Set[str]) -> Iterator[None]:
    """Inside, sentence-transformers' own Pooling and Normalize in the places of the fused poolings of these names."""
    if not names:
        yield
        return
    from .sentence_transformers import plain_modules

    modules = dict(model.named_modules(remove_duplicate=False))
    plain = {name: plain_modules(modules[name]) for name in names}
    changed = []
    for parent, name, path, child in list(surgery.places(model)):
        if path in names:
            changed.append((parent, name, child))
            parent._modules[name], _ = plain[path]
        elif isinstance(child, surgery.Absorbed) and (pooling := surgery.sibling(path, child.by)) in names:
            changed.append((parent, name, child))
            _, parent._modules[name] = plain[pooling]
    try:
        yield
    finally:
        for parent, name, child in changed:
            parent._modules[name] = child


class _ConfigOnly:
    """Stands in for a transformers model's save_pretrained."""

    def __init__(self, encoder: Any) -> None:
        self.encoder = encoder

    def __call__(self, folder: str, **_: Any) -> None:
        # from_pretrained chooses classes by this, and the model's own saving would have set it.
        self.encoder.config.architectures = [type(self.encoder).__name__]
        self.encoder.config.save_pretrained(folder)


def build_skeleton(library: str, name: str, folder: Path) -> nn.Module:
    """A model of the class `name` of a library, without weights: all its tensors are on the meta device.

    Raises:
        ValueError: the library does not build such models.
    """
    if library == "torch":
        raise ValueError(f"model must be given to load a {name} into, got None")
    import transformers

    if library == "transformers":
        architecture = getattr(transformers, name, None)
        if architecture is None:
            raise ValueError(f"model must be given: transformers has no class {name}")
        with torch.device("meta"):
            return architecture(transformers.AutoConfig.from_pretrained(folder))
    import sentence_transformers
    from sentence_transformers.base.modules.module import Module

    # A CrossEncoder or SparseEncoder; a user's own class is built as what it extends.
    build: Any = getattr(sentence_transformers, name, None)
    if not (isinstance(build, type) and issubclass(build, nn.Sequential)):
        build = sentence_transformers.SentenceTransformer
    with _without_weights(transformers.PreTrainedModel, Module):
        return build(str(folder), device="meta", local_files_only=True)


@contextmanager
def _without_weights(base: type, module: type) -> Iterator[None]:
    """Inside, this thread builds models from their configurations alone, transformers' on the meta device.

    sentence-transformers calls `from_pretrained` of transformers models (`base`) and `load_torch_weights` of its own
    modules (`module`) by itself. Other threads get the methods as they are, and wait to do the same.
    """
    thread = threading.get_ident()
    with _building:
        from_pretrained, load_weights = base.__dict__["from_pretrained"], module.__dict__["load_torch_weights"]

        def from_config(cls: type, *args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != thread:
                return from_pretrained.__get__(None, cls)(*args, **kwargs)
            with torch.device("meta"):
                return cls(kwargs["config"])

        def if_there(cls: Any, model_name_or_path: str, subfolder: str = "", **kwargs: Any) -> Any:
            file = Path(model_name_or_path, subfolder, "model.safetensors")
            if threading.get_ident() == thread and kwargs.get("model") is not None and not file.exists():
                return kwargs["model"]
            return load_weights.__get__(None, cls)(model_name_or_path, subfolder, **kwargs)

        base.from_pretrained = classmethod(from_config)  # type: ignore[attr-defined]
        module.load_torch_weights = classmethod(if_there)  # type: ignore[attr-defined]
        try:
            yield
        finally:
            base.from_pretrained = from_pretrained  # type: ignore[attr-defined]
            module.load_torch_weights = load_weights  # type: ignore[attr-defined]


def _nothing(*_: Any, **__: Any) -> None:
    """Stands in for the saving of weights that the quantised file holds."""
