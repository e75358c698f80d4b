"""Low-bit linear layers beside PyTorch's, ONNX Runtime's, ggml's and auto-round-lib's at the same bits.

The linear layers of real text encoders (MiniLM: 384 and 1536; BERT-base: 768 and 3072; BERT-large: 1024 and 4096; and
4096 x 4096), from one token to a large batch. Two of them at every width, the others at 4 and 8 bits; a quarter of an
hour with `--seconds 0.1`. Weights and activations are Gaussian; the error is relative to the float64 layer, so it holds
the rounding of the weights as well as that of the activations, and differs by bits rather than by library. ONNX
Runtime's dynamic int8 has 8-bit weights per output feature and one activation scale per tensor.

Cases "from memory" go through copies of a layer that no last-level cache holds, one call each in turn. "bare kernel" is
the core called with nothing left to check or to allocate.
"""

import copy
import dataclasses
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor, nn

from fastembed.nn import QuantLinear

from . import Case, Context, Faster, Goal, OfLimit, Workload
from ._qmatmul_plot import plot as plot
from .peers import auto_round, ggml, onnx_runtime

# out_features, in_features
SHAPES = ((384, 384), (1536, 384), (384, 1536), (3072, 768), (4096, 1024), (4096, 4096))
EVERY_WIDTH = ((1536, 384), (4096, 1024))
BITS = (2, 3, 4, 5, 6, 7, 8)
FEW_BITS = (4, 8)
MOST_ROWS = 2048
QUICK_FEATURES, QUICK_ROWS = 256, 8
MEMORY_SHAPE, MEMORY_BITS = (4096, 1024), (2, 4, 8)
MEMORY_BYTES = 1 << 28
# Operations of a call above which three rounds have to do.
LONG_CALL = 1 << 33

# Relative errors that the bits explain: 4-bit round-to-nearest in groups is near 0.1 on Gaussian weights.
TOLERANCE = {
    2: 0.8,
    3: 0.35,
    4: 0.15,
    5: 0.08,
    6: 0.05,
    7: 0.03,
    8: 0.03,
    16: 0.01,
    32: 1e-4,
}
# What one token must reach against every peer of its bits.
ONE_TOKEN = {2: 1.0, 3: 1.5, 4: 1.3, 5: 1.5, 6: 1.5, 7: 1.0, 8: 1.0}
# What many tokens must reach against ONNX Runtime's MatMulNBits.
MANY_TOKENS = {2: 8.0, 4: 3.0, 8: 1.0}
INT8 = "ONNX Runtime dynamic int8"
BARE = "bare kernel"

Provider = Callable[[], Tensor]
Providers = Iterator[tuple[str, int, Provider]]  # name, bits of the weights, call


def cases() -> Iterator[Case]:
    for n, k in SHAPES:
        widths, counts = (BITS, (1, 8, 64, 512)) if (n, k) in EVERY_WIDTH else (FEW_BITS, (1, 64, 512))
        products = [
            *itertools.product(counts, widths, [64]),
            *itertools.product((64, 512), widths, [128]),
            *itertools.product([MOST_ROWS], FEW_BITS, [64]),
        ]
        for tokens, bits, group_size in products:
            name = f"{n}x{k}, {_tokens(tokens)}, {bits}-bit, groups of {group_size}"
            setup = partial(_int8_workload, n=n, k=k, rows=tokens, bits=bits, group_size=group_size)
            yield Case(name, setup, quick=(n, k) == SHAPES[0] and tokens < 512 and group_size == 64)
    for (n, k), rows in itertools.product(EVERY_WIDTH, (1, 8, 512)):
        name = f"{n}x{k}, {_tokens(rows)}, 4-bit, float activations in bfloat16"
        yield Case(name, partial(_float_workload, n=n, k=k, rows=rows), quick=(n, rows) == (1536, 1))
    for bits in MEMORY_BITS:
        name = f"{MEMORY_SHAPE[0]}x{MEMORY_SHAPE[1]}, 1 token, {bits}-bit, from memory"
        yield Case(name, partial(_memory_workload, bits=bits), quick=bits == MEMORY_BITS[0])


def _tokens(rows: int) -> str:
    return f"{rows} token{'s' if rows > 1 else ''}"


def _int8_workload(context: Context, n: int, k: int, rows: int, bits: int, group_size: int) -> Workload:
    problem = _problem(context.quick, n, k, rows)
    linear, x = problem.linear, problem.x
    layer = QuantLinear.from_linear(linear, bits=bits, group_size=group_size)
    providers = [("fastembed", bits, _inference(layer, x))]
    if rows == 1:
        providers.append((BARE, bits, _bare_call(layer, x, context.threads)))
    peers = [
        *_onnx_peers(linear, x, bits, group_size, context.threads),
        *_ggml_peers(linear, x, bits, context.threads),
        *_auto_round_peers(linear, x, bits, group_size, context.threads),
    ]
    providers += [*peers, *_int8_peers(linear, x, context.threads)]
    if x.shape[0] >= 64:
        against = MANY_TOKENS.get(bits, 1.0)
        goals = [Faster(INT8, 0.95), *(Faster(name, against) for name, *_ in peers)]
    elif x.shape[0] > 1:
        goals = [Faster(INT8, 1 / 1.3), *(Faster(name, 1.0) for name, *_ in peers)]
    else:
        goals = [
            Faster(INT8, 1.0),
            *(Faster(name, ONE_TOKEN[bits]) for name, *_ in peers),
        ]
    return _workload(problem, providers, goals)


def _float_workload(context: Context, n: int, k: int, rows: int) -> Workload:
    problem = _problem(context.quick, n, k, rows)
    linear, x = problem.linear, problem.x
    half = copy.deepcopy(linear).bfloat16()
    layer = QuantLinear.from_linear(linear, bits=4, activations="float")
    providers = [
        ("fastembed", 4, _inference(layer, x.bfloat16())),
        ("fastembed, float32 activations", 4, _inference(layer, x)),
        ("torch bfloat16", 16, _inference(half, x.bfloat16())),
        ("torch float32", 32, _inference(linear, x)),
    ]
    return _workload(
        problem,
        providers,
        [Faster("torch bfloat16", 0.9), Faster("torch float32", 1.0)],
    )


def _memory_workload(context: Context, bits: int) -> Workload:
    problem = _problem(context.quick, *MEMORY_SHAPE, 1)
    linear, x = problem.linear, problem.x
    layer = QuantLinear.from_linear(linear, bits=bits, group_size=128)
    count = 2 if context.quick else -(-MEMORY_BYTES // layer.nbytes)
    layers = itertools.cycle([_same_layer(layer) for _ in range(count)])

    def call() -> Tensor:
        return next(layers)(x)

    workload = _workload(problem, [("fastembed", bits, call)], [OfLimit(0.8)])
    return dataclasses.replace(workload, demands={"read": float(layer.nbytes)})


def _same_layer(layer: QuantLinear) -> QuantLinear:
    """In memory as layers have it; deepcopy would give it what other tensors have."""
    same = QuantLinear(layer.in_features, layer.out_features, bits=layer.bits, group_size=layer.group_size)
    same.load_state_dict(layer.state_dict())
    return same.eval()


@dataclass(frozen=True)
class _Problem:
    linear: nn.Linear
    x: Tensor
    expected: Tensor  # float64


@lru_cache(maxsize=1)
def _problem(quick: bool, n: int, k: int, rows: int) -> _Problem:
    """One for all widths of a shape: the float64 product of a large one takes seconds."""
    if quick:
        n = k = QUICK_FEATURES
        rows = min(rows, QUICK_ROWS)
    torch.manual_seed(0)
    linear = nn.Linear(k, n).eval().requires_grad_(False)
    nn.init.normal_(linear.weight, std=k**-0.5)
    x = torch.randn(rows, k)
    return _Problem(linear, x, nn.functional.linear(x.double(), linear.weight.double(), linear.bias.double()))


def _workload(
    problem: _Problem, providers: list[tuple[str, int, Provider]], goals: Sequence[Goal], limit: str = "int8"
) -> Workload:
    linear, x, expected = problem.linear, problem.x, problem.expected
    bias = linear.bias.double()

    def verify(name: str, y: Tensor) -> float:
        y = y.double() + bias if name.startswith("ggml") else y.double()  # its product has no bias
        return float((y - expected).norm() / expected.norm())

    operations = 2.0 * x.shape[0] * linear.in_features * linear.out_features
    return Workload(
        providers={name: call for name, _, call in providers},
        verify=verify,
        tolerance={name: TOLERANCE[bits] for name, bits, _ in providers},
        amount=operations,
        unit="op",
        demands={limit: operations},
        goals=goals,
        rounds=3 if operations > LONG_CALL else 7,
    )


def _inference(module: nn.Module, x: Tensor) -> Provider:
    """Without a context for inference around every call, which users put around a model: nothing here has gradients."""
    return partial(module, x)


def _bare_call(layer: QuantLinear, x: Tensor, threads: int) -> Provider:
    handle, y = layer._prepare().handle, torch.empty(x.shape[0], layer.out_features)
    arguments = (x.data_ptr(), 0, x.shape[0], x.stride(0), 0, y.data_ptr(), threads)

    def call() -> Tensor:
        handle(*arguments)
        return y

    call.layer = layer  # type: ignore[attr-defined]  # the handle knows its tensors by address only
    return call


def _int8_peers(linear: nn.Linear, x: Tensor, threads: int) -> Providers:
    """8-bit weights per output feature."""
    if "x86" in torch.backends.quantized.supported_engines:
        torch.backends.quantized.engine = "x86"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated, and still what PyTorch users have
            dynamic = torch.ao.quantization.quantize_dynamic(nn.Sequential(linear), {nn.Linear}, dtype=torch.qint8)
        yield "torch dynamic int8", 8, _inference(dynamic, x)
    if onnx_runtime.is_installed():
        yield INT8, 8, onnx_runtime.dynamic_int8(linear, x, threads)


def _onnx_peers(linear: nn.Linear, x: Tensor, bits: int, group_size: int, threads: int) -> Providers:
    if onnx_runtime.is_installed() and bits in (2, 4, 8):
        yield "ONNX Runtime MatMulNBits", bits, onnx_runtime.matmul_nbits(linear, x, bits, group_size, threads)


def _ggml_peers(linear: nn.Linear, x: Tensor, bits: int, threads: int) -> Providers:
    if (kind := ggml.kind_for(bits, linear.in_features)) is not None:
        yield f"ggml {kind}", bits, ggml.linear(linear.weight, x, kind, threads)


def _auto_round_peers(linear: nn.Linear, x: Tensor, bits: int, group_size: int, threads: int) -> Providers:
    if auto_round.takes(threads):
        yield "auto-round-lib", bits, auto_round.linear(linear, x, bits, group_size)
