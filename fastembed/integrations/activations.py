"""Which activation function follows a linear layer and nothing else, so that the layer's epilogue can apply it."""

import copy

import torch
from torch import fx, nn

# By class name, so that transformers need not be imported. Its GELU classes differ in how they spell the formula only.
_EPILOGUES = {
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "ReLU": "relu",
}


def epilogue_of(module: nn.Module) -> str | None:
    """The `QuantLinear` epilogue that computes what an activation module does, or None."""
    if type(module) is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    if type(module).__module__ in ("torch.nn.modules.activation", "transformers.activations"):
        return _EPILOGUES.get(type(module).__name__)
    return None


def find_epilogues(parent: nn.Module) -> dict[str, str]:
    """Pairs of children {linear's name: activation's name} where the activation takes what the linear gives.

    Found by tracing the parent's forward, so no architecture needs to be known by name: the linear's output must go
    into the activation and nowhere else, and neither may be used a second time.
    """
    names = {name for name, child in parent.named_children() if epilogue_of(child) is not None}
    if not names or not any(type(child) is nn.Linear for child in parent.children()):
        return {}
    try:
        graph = _ChildTracer().trace(copy.copy(parent))  # a copy: a forward may set attributes
    except Exception:  # whatever a forward does that tracing cannot follow, the layer just keeps its activation
        return {}
    calls = [node for node in graph.nodes if node.op == "call_module"]
    targets = [node.target for node in calls]
    pairs = {}
    for node in calls:
        source = node.args[0] if len(node.args) == 1 and not node.kwargs else None
        if (
            node.target in names
            and isinstance(source, fx.Node)
            and source.op == "call_module"
            and type(parent._modules.get(str(source.target))) is nn.Linear
            and len(source.users) == 1
            and targets.count(node.target) == targets.count(source.target) == 1
        ):
            pairs[str(source.target)] = str(node.target)
    return pairs


class _ChildTracer(fx.Tracer):
    """Records the calls of a module's children without looking inside them."""

    def is_leaf_module(self, m: torch.nn.Module, module_qualified_name: str) -> bool:
        return True
