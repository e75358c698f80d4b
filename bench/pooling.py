"""Multi-exit pooling: ours, sentence-transformers' modules, and the best that plain PyTorch does.

The hidden states are larger than a last-level cache, as after the layers of a large batch; the limit is reading their
valid tokens once, from memory as PyTorch allocates it ("tensor read"). Since a virtual machine's memory delivers now
more, now less, "reading alone" also reads those very bytes in turns with the others, and does nothing else. One case is
the opposite: a short query, all overhead. The backward cases leave the forward out.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

import fastembed

from . import Case, Context, Faster, Goal, OfLimit, Reached, Workload, limits, optional_import
from .harness import environment
from .harness.workload import OURS

st_models = optional_import("sentence_transformers.models")

PEER = "sentence-transformers"
BMM = "PyTorch bmm"
COMPILED = "torch.compile"
COMPILED_BMM = "torch.compile of bmm"
FILL = "PyTorch fill"
READ = "reading alone"
WRITE = "writing alone"
BY_MODE = "mode by mode"
# Bytes; hidden states that may stay in a cache between calls owe the memory nothing.
LARGEST_CACHE = 1 << 26
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
Pooled = list[dict[int, Tensor]]


def cases() -> Iterator[Case]:
    goals: list[Goal] = [Faster(PEER, 5.0), Faster(BMM, 1.3), Faster(READ, 0.9)]
    compiled = [*goals, Faster(COMPILED, 1.3), Faster(COMPILED_BMM, 1.3)]
    yield Case("mean, 6 exits, 64 x 256 x 384", _pooling("mean", 6, 64, 256, 384, goals=goals))
    yield Case("mean, 6 exits, 32 x 256 x 768", _pooling("mean", 6, 32, 256, 768, goals=compiled))
    yield Case("mean, 6 exits, 4 x 512 x 4096", _pooling("mean", 6, 4, 512, 4096, goals=compiled))
    first = _pooling("mean", 6, 32, 256, 768, first_dim=256, dims=3, goals=[*goals[:2], OfLimit(0.9)])
    yield Case("mean, 6 exits, 32 x 256 x 768, first 256", first)
    yield Case("mean, 6 exits, 32 x 256 x 768, 60% valid", _pooling("mean", 6, 32, 256, 768, valid=0.6, goals=goals))
    bfloat16 = _pooling("mean", 6, 64, 256, 768, dtype=torch.bfloat16, goals=goals)
    yield Case("mean, 6 exits, 64 x 256 x 768, bfloat16", bfloat16)
    others: list[Goal] = [Faster(PEER, 5.0), Faster(READ, 0.9)]
    yield Case("max, 6 exits, 32 x 256 x 768", _pooling("max", 6, 32, 256, 768, goals=others))
    yield Case("weightedmean, 6 exits, 32 x 256 x 768", _pooling("weightedmean", 6, 32, 256, 768, goals=others))
    modes = ["cls", "mean", "max"]
    several: list[Goal] = [*others, Faster(BY_MODE, 1.3)]
    yield Case("cls, mean and max, 6 exits, 32 x 256 x 768", _pooling(modes, 6, 32, 256, 768, goals=several))
    tiny: list[Goal] = [Faster(PEER, 1.0), Faster(BMM, 1.0)]
    yield Case("mean, 1 exit, 1 x 8 x 384", _pooling("mean", 1, 1, 8, 384, dims=1, goals=tiny))
    for mode in ("mean", "max"):
        for reuse in (True, False):
            memory = "reused" if reuse else "fresh"
            case = f"backward of {mode} to {memory} memory, 6 exits, 32 x 256 x 768"
            yield Case(case, _backward(mode, 6, 32, 256, 768, reuse=reuse))


def _pooling(
    mode: str | list[str],
    exits: int,
    batch: int,
    length: int,
    size: int,
    *,
    dims: int = 5,
    first_dim: int | None = None,
    valid: float = 1.0,
    dtype: torch.dtype = torch.float32,
    goals: list[Goal],
) -> Callable[[Context], Workload]:
    """`dims`: how many, halving from `first_dim` (None: `size`); `valid`: mean length of the right-padded sequences."""

    def setup(context: Context) -> Workload:
        hidden_states, mask = _inputs(context, exits, batch, length, size, valid, dtype)
        whole = (first_dim or size) * (1 if isinstance(mode, str) else len(mode))
        prefixes = [whole >> i for i in range(dims)]

        providers: dict[str, Callable[[], Any]] = {
            OURS: lambda: fastembed.pool_exits(hidden_states, mask, mode=mode, dims=prefixes)
        }
        if st_models is not None:
            providers[PEER] = _sentence_transformers(hidden_states, mask, mode, prefixes)
        if not isinstance(mode, str):
            providers[BY_MODE] = lambda: _mode_by_mode(hidden_states, mask, mode, prefixes)
        if mode == "mean":
            providers[BMM] = lambda: _bmm(hidden_states, mask, prefixes)
            if not context.quick and Faster(COMPILED, 1.3) in goals:  # a minute of compilation
                compiled, compiled_bmm = (torch.compile(form, dynamic=False) for form in (_masked_mean, _bmm))
                providers[COMPILED] = lambda: compiled(hidden_states, mask, prefixes)
                providers[COMPILED_BMM] = lambda: compiled_bmm(hidden_states, mask, prefixes)

        if context.device == "cpu" and first_dim is None:
            lengths = mask.sum(dim=1).tolist()
            pieces = [row[:length] for hidden in hidden_states for row, length in zip(hidden, lengths, strict=True)]
            providers[READ] = limits.reader(pieces, context.threads)

        expected = [_oracle(hidden, mask, mode, prefixes) for hidden in hidden_states]
        alone = fastembed.pool_exits([hidden[-1:] for hidden in hidden_states], mask[-1:], mode=mode, dims=prefixes)
        pairs = [
            torch.equal(vectors[0], of_batch[dim][-1])
            for by_dim, of_batch in zip(alone, providers[OURS](), strict=True)
            for dim, vectors in by_dim.items()
        ]
        same_alone = Reached(
            "of the vectors of a row alone are those of the batch, bit for bit", 1.0, sum(pairs) / len(pairs)
        )
        read = int(mask.sum()) * (first_dim or size) * exits * hidden_states[0].element_size()
        return Workload(
            providers=providers,
            verify=lambda name, result: 0.0 if name == READ else _largest_error(result, expected),
            tolerance=TOLERANCE[dtype],
            amount=read,
            unit="B",
            demands={"tensor read": read} if hidden_states[0].nbytes * exits > LARGEST_CACHE else {},
            goals=[*goals, same_alone],
        )

    return setup


def _backward(
    mode: str, exits: int, batch: int, length: int, size: int, *, reuse: bool
) -> Callable[[Context], Workload]:
    """The gradients of all hidden states, whose bytes have to be written: that is the limit, which "writing alone"
    shows in turns with the others. Of fresh memory the system has to clear every page first; "fill" does nothing but
    allocate and write either kind."""

    def setup(context: Context) -> Workload:
        environment.reuse_memory(reuse)
        hidden_states, mask = _inputs(context, exits, batch, length, size, 1.0, torch.float32)
        prefixes = [size >> i for i in range(5)]
        for hidden in hidden_states:
            hidden.requires_grad_()

        def backward(pool: Callable[[], Pooled]) -> Callable[[], Any]:
            outputs = [embedding for by_dim in pool() for embedding in by_dim.values()]
            generator = torch.Generator(context.device).manual_seed(1)
            grads = [torch.randn(out.shape, generator=generator, device=context.device) for out in outputs]
            return lambda: torch.autograd.grad(outputs, hidden_states, grads, retain_graph=True)

        def ours() -> Pooled:
            return fastembed.pool_exits(hidden_states, mask, mode=mode, dims=prefixes)

        with fastembed.use_backend("reference"):
            expected = backward(ours)()
        providers = {
            OURS: backward(ours),
            FILL: lambda: [torch.full(hidden.shape, 1.0, device=hidden.device) for hidden in hidden_states],
        }
        if st_models is not None:
            providers[PEER] = backward(_sentence_transformers(hidden_states, mask, mode, prefixes))
        if mode == "mean":
            providers[BMM] = backward(lambda: _bmm(hidden_states, mask, prefixes))
        if reuse and context.device == "cpu":
            rows = [row for hidden in hidden_states for row in torch.ones_like(hidden, requires_grad=False)]
            providers[WRITE] = limits.writer(rows, context.threads)

        def error(provider: str, result: Any) -> float:
            if provider in (FILL, WRITE):
                return 0.0
            pairs = zip(result, expected, strict=True)
            return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)

        written = sum(hidden.nbytes for hidden in hidden_states)
        return Workload(
            providers=providers,
            verify=error,
            tolerance=1e-5,
            amount=written,
            unit="B",
            demands={"tensor write": written} if reuse and written > LARGEST_CACHE else {},
            goals=[Faster(WRITE if reuse else FILL, 1 / 1.2), Faster(PEER, 5.0)],
        )

    return setup


def _inputs(
    context: Context, exits: int, batch: int, length: int, size: int, valid: float, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor]:
    rows, tokens = (min(batch, 2), min(length, 20)) if context.quick else (batch, length)
    generator = torch.Generator(context.device).manual_seed(0)
    shape = (rows, tokens, size)
    hidden_states = [torch.randn(shape, generator=generator, device=context.device).to(dtype) for _ in range(exits)]
    lengths = torch.linspace(2 * valid - 1, 1, rows, device=context.device).mul(tokens).round()
    return hidden_states, (torch.arange(tokens, device=context.device) < lengths[:, None]).long()


def _mode_by_mode(hidden_states: list[Tensor], mask: Tensor, modes: list[str], dims: list[int]) -> Pooled:
    """Ours, reading the hidden states once for each mode."""
    parts = [fastembed.pool_exits(hidden_states, mask, mode=mode, normalize=False) for mode in modes]
    wholes = [torch.cat([next(iter(vectors.values())) for vectors in exit], dim=1) for exit in zip(*parts, strict=True)]
    return [{dim: normalize(vectors[:, :dim], dim=1) for dim in dims} for vectors in wholes]


def _sentence_transformers(
    hidden_states: list[Tensor], mask: Tensor, mode: str | list[str], dims: list[int]
) -> Callable[[], Pooled]:
    """Its modules as they are used: one forward of Pooling and of Normalize for every exit and dim."""
    pooling = st_models.Pooling(hidden_states[0].shape[-1], pooling_mode=mode if isinstance(mode, str) else tuple(mode))
    to_unit = st_models.Normalize()

    def embed(hidden: Tensor, dim: int) -> Tensor:
        pooled = pooling({"token_embeddings": hidden, "attention_mask": mask})["sentence_embedding"]
        return to_unit({"sentence_embedding": pooled[:, :dim]})["sentence_embedding"]

    return lambda: [{dim: embed(hidden, dim) for dim in dims} for hidden in hidden_states]


def _bmm(hidden_states: list[Tensor], mask: Tensor, dims: list[int]) -> Pooled:
    """The mean as one matrix product per exit: the fastest form we found in plain PyTorch."""
    weights = (mask / mask.sum(dim=1, keepdim=True)).to(hidden_states[0].dtype)[:, None]
    pooled = [torch.bmm(weights, hidden)[:, 0] for hidden in hidden_states]
    return [{dim: normalize(vectors[:, :dim], dim=1) for dim in dims} for vectors in pooled]


def _masked_mean(hidden_states: list[Tensor], mask: Tensor, dims: list[int]) -> Pooled:
    """What a compiler can fuse."""
    weights = (mask / mask.sum(dim=1, keepdim=True))[..., None]
    pooled = [(hidden * weights).sum(dim=1) for hidden in hidden_states]
    return [{dim: normalize(vectors[:, :dim], dim=1) for dim in dims} for vectors in pooled]


def _oracle(hidden: Tensor, mask: Tensor, mode: str | list[str], dims: list[int]) -> dict[int, Tensor]:
    with fastembed.use_backend("reference"):
        return fastembed.pool_exits([hidden.double()], mask, mode=mode, dims=dims)[0]


def _largest_error(result: Any, expected: Pooled) -> float:
    return max(
        (by_dim[dim].double() - exact).abs().max().item()
        for by_dim, exacts in zip(result, expected, strict=True)
        for dim, exact in exacts.items()
    )
