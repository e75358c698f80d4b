"""How an op is registered with PyTorch, and how it is called.

An op is one Python function per backend, all with the same signature, registered under one schema in the `fastembed::`
namespace, with a fake kernel for tracing and a backward. Eager inference calls the chosen function directly: the
dispatcher costs more than a small kernel. Everything else (torch.compile, export and trace, autograd, subclasses,
functorch) goes through the registered op, except that forward-mode differentiation raises: a registered op has no place
for a formula of its tangents, and without one they would silently be zeros.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from .. import backends

_library = torch.library.Library("fastembed", "DEF")

Implementation = Callable[..., Any]

# The backends that take a device's tensors, the best first; elsewhere PyTorch runs the reference.
_OF_DEVICE = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}

_NEVER_TENSORS = frozenset({type(None), bool, int, float, str, torch.dtype})
_is_compiling = torch.compiler.is_dynamo_compiling
_is_tracing = torch._C._is_tracing
_dispatch_modes = torch._C._len_torch_dispatch_stack
_is_grad_enabled = torch.is_grad_enabled
_functorch_level = torch._C._functorch.peek_interpreter_stack


class Op:
    """A registered op. Call it with the positional arguments of its schema.

    Args:
        schema: as `torch.library.Library.define` takes it, name included.
        implementations: a function per backend name; "reference" MUST be there. Alone it serves every backend: an op
            that has no kernels anywhere yet, such as a backward, must not break a model whose backend was forced.
        fake: the op on fake tensors: shapes, dtypes and strides only.
        accepts: dtypes of the first tensor that a backend handles; others fall to the reference. A backend not
            listed accepts everything.
        backward, setup_context: as `torch.library.register_autograd` takes them. Without them the backward raises.
    """

    def __init__(
        self,
        schema: str,
        *,
        implementations: Mapping[str, Implementation],
        fake: Callable[..., Any],
        accepts: Mapping[str, frozenset[torch.dtype]] | None = None,
        backward: Callable[..., Any] | None = None,
        setup_context: Callable[..., Any] | None = None,
    ) -> None:
        self.name = schema.partition("(")[0]
        self._implementations = dict(implementations)
        self._accepts = dict(accepts or {})
        _library.define(schema)
        for key in ("CPU", "CUDA"):
            _library.impl(self.name, self.run, key)
        qualified = f"fastembed::{self.name}"
        torch.library.register_fake(qualified, fake, lib=_library)
        torch.library.register_autograd(
            qualified, backward or self._no_backward, setup_context=setup_context, lib=_library
        )
        self.overload = getattr(torch.ops.fastembed, self.name).default

    def __call__(self, *args: Any) -> Any:
        tensors = _tensors(args)
        if is_plain_eager(tensors):
            return self._implementation_for(tensors[0])(*args)
        if in_forward_mode() and any(_has_tangent(tensor) for tensor in tensors):
            raise NotImplementedError(
                f"fastembed::{self.name} has no forward-mode derivative (torch.func.jvp, jacfwd): use reverse mode"
            )
        return self.overload(*args)

    def run(self, *args: Any) -> Any:
        """Run the implementation that backend choice, device and dtype select."""
        return self._implementation_for(_tensors(args)[0])(*args)

    def backend(self, first: torch.Tensor) -> str:
        """The backend that a call whose first tensor is this one runs on."""
        return self._choose(first.device.type, first.dtype)

    def _implementation_for(self, first: torch.Tensor) -> Implementation:
        return self._implementations[self.backend(first)]

    def _choose(self, device: str, dtype: torch.dtype) -> str:
        forced = backends.forced_backend()
        if forced is not None and len(self._implementations) > 1:
            if forced not in self._implementations:
                raise NotImplementedError(f"fastembed::{self.name} has no {forced!r} backend yet")
            if (problem := _device_problem(forced, device)) is not None:
                raise RuntimeError(f"fastembed::{self.name}: backend {forced!r} was asked for, but {problem}")
            if dtype not in self._accepts.get(forced, {dtype}):
                raise TypeError(f"fastembed::{self.name}: backend {forced!r} does not take {dtype}")
            return forced
        for name in _OF_DEVICE.get(device, ()):
            if (
                name in self._implementations
                and dtype in self._accepts.get(name, {dtype})
                and (name == "cpu" or backends.unavailable_reason(name) is None)
            ):
                return name
        return "reference"

    def _no_backward(self, ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(f"fastembed::{self.name} has no backward: use it under torch.no_grad()")


def _device_problem(backend: str, device: str) -> str | None:
    if backend == "cpu" and device != "cpu":
        return f"the tensors are on {device}"
    if backend == "cuda" and device != "cuda" and not backends.cuda_is_simulated():
        return f"the tensors are on {device}"
    if backend == "triton" and device != "cuda" and not backends.triton_is_interpreted():
        return f"the tensors are on {device}"
    return None


def is_plain_eager(tensors: Iterable[Any]) -> bool:
    """Whether an op on these tensors, or Nones, may skip the dispatcher: nothing is traced, recorded or transformed."""
    if _is_compiling() or _is_tracing() or _dispatch_modes() > 0 or _functorch_level() is not None:
        return False
    if in_forward_mode():
        return False
    grad_enabled = _is_grad_enabled()
    for tensor in tensors:
        if tensor is None:
            continue
        kind = type(tensor)
        if kind is not Tensor and kind is not Parameter:
            return False
        if (grad_enabled and tensor.requires_grad) or tensor.is_meta:
            return False
    return True


def in_forward_mode() -> bool:
    """Whether tensors may have tangents: inside torch.func.jvp or torch.autograd.forward_ad.dual_level."""
    return not _is_compiling() and forward_ad._current_level >= 0


def _has_tangent(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and forward_ad.unpack_dual(tensor).tangent is not None


def _tensors(args: Iterable[Any]) -> list[Any]:
    """The tensors among the arguments and in the lists among them."""
    found = []
    for arg in args:
        if type(arg) in _NEVER_TENSORS:  # asking isinstance of each costs as much as a small kernel
            continue
        if isinstance(arg, torch.Tensor):
            found.append(arg)
        elif isinstance(arg, (list, tuple)) and arg and isinstance(arg[0], torch.Tensor):
            found += arg
    return found
