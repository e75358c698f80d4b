"""Put fastembed's layers into an existing model, and take them out again."""

import copy
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .integrations import surgery
from .integrations.activations import epilogue_of, find_epilogues
from .nn import QuantLinear
from .quantization.config import QuantConfig, fits

_FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a component of a module's name that is a number
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class SwapRow:
    """One replaced module.

    Attributes:
        name: where it stands in the model.
        kind: what it is now, "linear", "linear + gelu", "pooling", "pooling + normalize".
        bits: bits per weight that are stored, scales and zero points included; None where there are no weights.
        bytes_before, bytes_after: of its parameters and buffers. Of tied layers the first carries them.
    """

    name: str
    kind: str
    bits: float | None
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class SwapReport:
    """What `swap` did. `str()` of it is a table.

    Attributes:
        rows: the replaced modules, in the model's order.
        left: linear layers that stay as they are: name -> why.
        bytes_before, bytes_after: of all parameters and buffers of the model.
        bytes_kept: of the original modules kept aside for `unswap`, on top of bytes_after.
    """

    rows: tuple[SwapRow, ...]
    left: dict[str, str]
    bytes_before: int
    bytes_after: int
    bytes_kept: int

    def __str__(self) -> str:
        table = [("module", "now", "bits", "before", "after")]
        for names, rows in _alike(self.rows):
            bits = "" if rows[0].bits is None else f"{rows[0].bits:.2f}"
            before, after = sum(row.bytes_before for row in rows), sum(row.bytes_after for row in rows)
            table.append((names, rows[0].kind, bits, _size(before), _size(after)))
        table.append(("whole model", "", "", _size(self.bytes_before), _size(self.bytes_after)))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        aligned = [
            [cell.ljust(width) if column < 2 else cell.rjust(width) for column, (cell, width) in cells]
            for cells in (enumerate(zip(row, widths, strict=True)) for row in table)
        ]
        lines = ["  ".join(cells) for cells in aligned]
        rule = "-" * max(map(len, lines))
        lines = [lines[0], rule, *lines[1:-1], rule, lines[-1]]
        if self.bytes_kept:
            lines.append(f"originals kept aside for unswap: {_size(self.bytes_kept)}")
        lines += [f"left as it is: {name} ({why})" for name, why in self.left.items()]
        return "\n".join(line.rstrip() for line in lines)


def _alike(rows: Sequence[SwapRow]) -> list[tuple[str, list[SwapRow]]]:
    """Rows that differ in one number of their name only, as one: layer.{0-5}.output.dense."""
    groups: dict[tuple[Any, ...], list[SwapRow]] = defaultdict(list)
    for row in rows:
        groups[_NUMBER.sub("#", row.name), row.kind, row.bits, row.bytes_before, row.bytes_after].append(row)
    named = []
    for group in groups.values():
        numbers = list(zip(*(_NUMBER.findall(row.name) for row in group), strict=True))
        varying = [position for position, column in enumerate(numbers) if len(set(column)) > 1]
        if len(varying) > 1:  # one number is a block, two are not obvious any more
            named += [(row.name, [row]) for row in group]
            continue
        parts = _NUMBER.split(group[0].name)
        labels = [column[0] for column in numbers]
        for position in varying:
            labels[position] = f"{{{numbers[position][0]}-{numbers[position][-1]}}}"
        name = parts[0] + "".join(label + part for label, part in zip(labels, parts[1:], strict=True))
        named.append((name if not varying else f"{name} ({len(group)})", group))
    return named


def swap(
    model: nn.Module,
    quantize: QuantConfig | None = QuantConfig(),  # noqa: B008 (frozen)
    pooling: bool = True,
    *,
    keep_originals: bool = True,
    verbose: bool = True,
) -> SwapReport:
    """Replace a model's linear layers by quantised ones and its pooling by ours, in place.

    The model is used as before: `encode`, `forward`, `to`, `half`, `train`, deepcopy and pickle work, gradients reach
    everything but the quantised weights, and `state_dict` holds the quantised tensors. `save_pretrained` (and `save`,
    `push_to_hub`) write the original model, so that what is saved loads anywhere and has lost nothing.

    - Every `torch.nn.Linear` becomes a `fastembed.nn.QuantLinear`; a GELU or ReLU that takes its output and nothing
      else is computed by it. Tied layers are quantised once and stay tied. Left alone: subclasses of nn.Linear, layers
      with hooks, layers inside modules that read their weights themselves (PyTorch's own composite ones and any whose
      forward does), weights tied to something else (an embedding), and what `quantize.skip` says.
    - In sentence-transformers models, Pooling and a Normalize behind it become one pass of `fastembed.pool_exits`.
    - Transformers encoders run large batches in slices that fit the processor's caches.

    Args:
        model: a SentenceTransformer, a transformers model, or any module that holds such.
        quantize: how the linear layers are quantised; None leaves them as they are.
        pooling: whether pooling is replaced.
        keep_originals: keep the replaced modules for `unswap` and saving. They stay in memory where they are, so a
            swapped model takes more memory than before, not less: False gives them up, and with them both.
        verbose: print the report.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: the model is swapped already, nothing in it can be replaced, a pattern of `quantize.skip` fits no
            linear layer, or a weight is NaN or infinite. The model is left as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if quantize is not None and not isinstance(quantize, QuantConfig):
        raise TypeError(f"quantize must be a QuantConfig or None, got {type(quantize).__name__}")
    if surgery.is_changed(model):
        raise ValueError("model is swapped already: call fastembed.unswap(model) first")
    plan = _Plan(keep_originals)
    bytes_before = surgery.tensor_bytes(model)
    if quantize is not None:
        _plan_linears(plan, model, quantize)
    if pooling:
        _plan_pooling(plan, model)
    if not plan.rows:
        reasons = "".join(f"\n  {name}: {why}" for name, why in plan.left.items())
        raise ValueError(f"model has nothing to swap{' that may be swapped:' + reasons if reasons else ''}")
    if quantize is not None:
        _plan_encoders(plan, model)
    _plan_saving(plan, model)
    plan.carry_out()
    report = SwapReport(
        tuple(plan.rows), plan.left, bytes_before, surgery.tensor_bytes(model), surgery.original_bytes(model)
    )
    if verbose:
        print(report)
    return report


def unswap(model: nn.Module) -> None:
    """Undo `swap`: put the very modules back that it replaced.

    They come back on the device and in the dtype that the model has by now. Works on any model that holds swapped
    parts, whichever model `swap` was called on.

    Raises:
        ValueError: the model is not swapped, or was swapped with `keep_originals=False`.
    """
    if not surgery.is_changed(model):
        raise ValueError("model is not swapped")
    _require_originals(model, "unswap it")
    surgery.restore(model)


@dataclass
class _Plan:
    """Everything to be done, worked out before the first change: what fails, fails while the model is untouched."""

    keep_originals: bool
    steps: list[Callable[[], None]] = field(default_factory=list)
    rows: list[SwapRow] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    def replace(self, parent: nn.Module, name: str, replacement: nn.Module) -> None:
        self.steps.append(lambda: surgery.replace_child(parent, name, replacement, keep=self.keep_originals))

    def override(self, module: nn.Module, name: str, function: Callable[..., Any], *bound: Any) -> None:
        self.steps.append(lambda: surgery.override_method(module, name, function, *bound))

    def carry_out(self) -> None:
        for step in self.steps:
            step()


@dataclass
class _Linear:
    """A linear layer to quantise, and every place in the model that holds it."""

    name: str
    module: nn.Linear
    places: list[tuple[nn.Module, str]] = field(default_factory=list)


def _plan_linears(plan: _Plan, model: nn.Module, config: QuantConfig) -> None:
    linears: dict[int, _Linear] = {}
    for parent, name, path, child in surgery.places(model):
        if isinstance(child, nn.Linear):
            linears.setdefault(id(child), _Linear(path, child)).places.append((parent, name))
    for pattern in config.skip:
        if not any(fits(pattern, linear.name) for linear in linears.values()):
            raise ValueError(f"skip must fit linear layers of the model, but {pattern!r} fits none")
    owners = _owners_of_tensors(model)
    quantised: dict[tuple[int, int], QuantLinear] = {}
    epilogues: dict[int, dict[str, str]] = {}
    for linear in linears.values():
        if (why := _why_left(linear, config, owners)) is not None:
            plan.left[linear.name] = why
            continue
        module = linear.module
        key = (id(module.weight), id(module.bias))
        tied = key in quantised
        if tied:
            layer = copy.copy(quantised[key])  # shares the dict of tensors, so the two stay tied through .to()
        else:
            layer = quantised[key] = _quantise(linear, config)
        epilogue = None
        if len(linear.places) == 1 and len(owners[id(module.weight)]) == 1:
            parent, name = linear.places[0]
            if id(parent) not in epilogues:
                epilogues[id(parent)] = find_epilogues(parent)
            if (activation := epilogues[id(parent)].get(name)) is not None:
                function = parent._modules[activation]
                assert function is not None
                epilogue = layer.epilogue = epilogue_of(function)
                plan.replace(parent, activation, surgery.Absorbed(by=name))
        for parent, name in linear.places:
            plan.replace(parent, name, layer)
        plan.rows.append(
            SwapRow(
                linear.name,
                "linear" + (f" + {epilogue}" if epilogue else "") + (" (tied)" if tied else ""),
                layer.bits_per_weight,
                0 if tied else surgery.tensor_bytes(module),
                0 if tied else layer.nbytes,
            )
        )


def _owners_of_tensors(model: nn.Module) -> dict[int, list[nn.Module]]:
    owners = defaultdict(list)
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)].append(module)
    return owners


def _why_left(linear: _Linear, config: QuantConfig, owners: dict[int, list[nn.Module]]) -> str | None:
    """Why a linear layer stays as it is, or None when it is to be quantised."""
    module = linear.module
    if config.skips(linear.name):
        return "skip"
    if type(module) is not nn.Linear:
        return f"a {type(module).__name__}, not a plain nn.Linear"
    for parent, name in linear.places:
        composite = type(parent).__module__.startswith("torch.nn.") and not isinstance(parent, _CONTAINERS)
        if composite or surgery.reads_weight(type(parent), name):
            return f"{type(parent).__name__} reads its weights itself"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "it has hooks"
    if not surgery.is_tensor_plain(module.weight):
        return f"its weight is a {type(module.weight).__name__} on {module.weight.device}"
    if module.weight.dtype not in _FLOAT_DTYPES:
        return f"its weight is {module.weight.dtype}"
    if not module.weight.numel():
        return "it is empty"
    for owner in owners[id(module.weight)]:
        if type(owner) is not nn.Linear or owner.weight is not module.weight:
            return f"its weight is tied to a {type(owner).__name__}"
        if owner.bias is not module.bias:
            return "its weight is tied to a layer with another bias"
    return None


def _quantise(linear: _Linear, config: QuantConfig) -> QuantLinear:
    bias = linear.module.bias
    try:
        if bias is not None and not bias.isfinite().all():
            raise ValueError("bias must be finite, got NaN or infinite entries")
        return QuantLinear.from_linear(
            linear.module,
            config.bits,
            config.group_size,
            config.symmetric,
            config.activations,
            scale_dtype=config.scale_dtype,
        )
    except ValueError as error:
        raise ValueError(f"{linear.name} cannot be quantised: {error}; the model is left as it was") from error


def _plan_pooling(plan: _Plan, model: nn.Module) -> None:
    if "sentence_transformers" not in sys.modules:  # then no module of the model can be one of its
        return
    from .integrations.sentence_transformers import FusedPooling, find_poolings

    names = {id(module): name for name, module in model.named_modules()}
    for parent, name, module, normalize in find_poolings(model):
        plan.replace(parent, name, FusedPooling(module, normalize=normalize is not None))
        if normalize is not None:
            plan.replace(parent, normalize, surgery.Absorbed(by=name))
        kind = "pooling" if normalize is None else "pooling + normalize"
        plan.rows.append(SwapRow(names[id(module)], kind, None, 0, 0))


def _plan_encoders(plan: _Plan, model: nn.Module) -> None:
    if "transformers" not in sys.modules:
        return
    from .integrations.transformers import find_encoders, forward_in_slices

    for encoder in find_encoders(model):
        plan.override(encoder, "forward", forward_in_slices)


def _plan_saving(plan: _Plan, model: nn.Module) -> None:
    """What sentence-transformers and transformers save, on whichever level it is called, is the original model."""
    for module in model.modules():
        if hasattr(type(module), "push_to_hub"):
            for method in ("save", "save_pretrained"):
                if hasattr(type(module), method):
                    plan.override(module, method, save_original, method)


def save_original(model: nn.Module, method: str, *args: Any, **kwargs: Any) -> Any:
    """Call a saving method of a swapped model with the originals in place, and swap back."""
    _require_originals(model, "save it")
    with surgery.restored(model):
        return getattr(model, method)(*args, **kwargs)


def _require_originals(model: nn.Module, purpose: str) -> None:
    if not surgery.keeps_originals(model):
        raise ValueError(f"model was swapped with keep_originals=False: swap with keep_originals=True to {purpose}")


def _size(size: int) -> str:
    return f"{size / 1e6:.2f} MB" if size >= 1e5 else f"{size} B"
