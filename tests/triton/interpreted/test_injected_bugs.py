"""Bugs put into the pooling kernels on purpose: the interpreter's checks, or a wrong result, must give each away."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
import triton
from changed_kernels import changed
from torch import Tensor

from fastembed.reference import pooling as reference
from fastembed.triton_kernels import pooling

# Sequences are cut sooner than in use, so that short ones already come in several pieces.
SHORT_PIECES = ("MIN_PIECE = tl.constexpr(512)", "MIN_PIECE = tl.constexpr(64)")
LONG = 100
DIMS = [[3, 20], [7]]


@dataclass
class Case:
    """A call that a sound kernel passes, its exits in one launch."""

    mode: str
    hidden_states: list[Tensor]
    attention_mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    normalize: bool = False

    def run(self, implementation: ModuleType) -> list[Tensor]:
        tokens = (self.attention_mask, self.cu_seqlens)
        return implementation.pool_exits(self.hidden_states, *tokens, self.mode, DIMS, self.normalize, torch.float32)


def padded(mode: str, *, nan_in: str, normalize: bool = False) -> Case:
    """Left and right padding, holes, an empty row; values below 0; NaN in the padding, or there and in a token."""
    generator = torch.Generator().manual_seed(0)
    hidden_states = [torch.randn(4, LONG, 20, generator=generator) - 4 for _ in DIMS]
    mask = torch.ones(4, LONG, dtype=torch.int64)
    mask[0, : LONG - 9], mask[1, 5:], mask[2, ::2], mask[3] = 0, 0, 0, 0
    for hidden in hidden_states:
        hidden[mask == 0] = torch.nan
        if nan_in == "token":
            hidden[0, LONG - 1, 1] = torch.nan
    return Case(mode, hidden_states, attention_mask=mask, normalize=normalize)


def packed(mode: str, *, normalize: bool = False) -> Case:
    generator = torch.Generator().manual_seed(0)
    hidden_states = [torch.randn(LONG + 50, 20, generator=generator) for _ in DIMS]
    return Case(mode, hidden_states, cu_seqlens=torch.tensor([0, 9, 9, 50, LONG + 50]), normalize=normalize)


def hostile_offsets(mode: str) -> Case:
    """No reference has a result for these: all that counts is that memory is left alone."""
    return Case(mode, [torch.ones(6, 20), torch.ones(6, 20)], cu_seqlens=torch.tensor([-9, 2**40, 3, 7]))


BUGS: dict[str, tuple[Callable[[], Case], str, str]] = {
    "columns not masked": (
        lambda: packed("mean"),
        "wanted = columns < _pick(widths, exit)",
        "wanted = columns < 2 * _pick(widths, exit)",
    ),
    "one token too many": (lambda: packed("mean"), "valid = token < end", "valid = token < end + 1"),
    "padding loaded": (lambda: padded("mean", nan_in="padding"), "!= 0\n        loaded", ">= 0\n        loaded"),
    "undefined lanes": (
        lambda: padded("mean", nan_in="padding"),
        "mask=loaded, other=0.0)",
        "mask=loaded)",
    ),
    "padding is zero for max": (
        lambda: padded("max", nan_in="padding"),
        'values = tl.where(loaded, values, float("-inf"))',
        "values = values",
    ),
    "offsets trusted": (
        lambda: hostile_offsets("mean"),
        "start = tl.minimum(tl.maximum(tl.load(cu_seqlens + row).to(tl.int64), 0), tokens)",
        "start = tl.load(cu_seqlens + row).to(tl.int64)",
    ),
    "lengths trusted": (
        lambda: hostile_offsets("lasttoken"),
        "end = tl.minimum(tl.maximum(tl.load(cu_seqlens + row + 1).to(tl.int64), start), tokens)",
        "end = tl.load(cu_seqlens + row + 1).to(tl.int64)",
    ),
    "pieces share a slot": (
        lambda: packed("mean"),
        "tl.num_programs(1) + piece) * rows",
        "tl.num_programs(1)) * rows",
    ),
    "exits share a slot": (lambda: packed("max"), "slot = (exit.to(tl.int64)", "slot = (0 * exit.to(tl.int64)"),
    "a piece is forgotten": (lambda: packed("mean"), "for piece in range(1,", "for piece in range(2,"),
    "pieces that nobody wrote": (
        lambda: packed("mean"),
        "range(1, tl.cdiv(length, _piece_length(length)))",
        "range(1, MAX_PIECES)",
    ),
    "weights from the row's start": (
        lambda: padded("weightedmean", nan_in="padding"),
        "(token - first + 1)",
        "(token + 1)",
    ),
    "weights not summed": (
        lambda: padded("weightedmean", nan_in="padding"),
        'weights if MODE == "weightedmean" else count',
        "count",
    ),
    "NaN lost among tokens": (
        lambda: padded("max", nan_in="token"),
        "total = tl.maximum(total, values, propagate_nan=tl.PropagateNan.ALL)",
        "total = tl.maximum(total, values)",
    ),
    "NaN lost among pieces": (
        lambda: padded("max", nan_in="token"),
        "pooled = tl.maximum(pooled, values, propagate_nan=tl.PropagateNan.ALL)",
        "pooled = tl.maximum(pooled, values)",
    ),
    "NaN lost in the norm": (
        lambda: padded("mean", nan_in="token", normalize=True),
        "tl.where(norm < EPS, EPS, norm)",
        "tl.maximum(norm, EPS)",
    ),
    "empty rows not zero": (
        lambda: padded("max", nan_in="padding"),
        "tl.where(count > 0, _pick(widths, exit), 0)",
        "_pick(widths, exit)",
    ),
    "last token of the wrong sequence": (
        lambda: packed("lasttoken"),
        "token = start + (first",
        "token = 0 * start + (first",
    ),
    "norm of the whole vector": (
        lambda: packed("cls", normalize=True),
        "tl.where(inside, pooled * pooled, 0.0)",
        "pooled * pooled",
    ),
    "stores past the prefix": (lambda: packed("cls"), "element_ty), mask=inside)", "element_ty))"),
}


def gives_itself_away(implementation: ModuleType, case: Case) -> bool:
    try:
        ours = case.run(implementation)
    except triton.runtime.errors.InterpreterError:
        return True
    if case.cu_seqlens is not None and case.cu_seqlens[0] < 0:
        return False
    expected = case.run(reference)
    return not all(
        torch.allclose(a, b, rtol=1e-5, atol=1e-6, equal_nan=True) for a, b in zip(ours, expected, strict=True)
    )


@pytest.mark.parametrize("bug", BUGS)
def test_bug_is_found(bug: str, tmp_path: Path) -> None:
    make_case, before, after = BUGS[bug]
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    try:
        assert not gives_itself_away(changed(pooling, tmp_path / "sound.py", SHORT_PIECES), make_case())
        assert gives_itself_away(changed(pooling, tmp_path / "broken.py", SHORT_PIECES, (before, after)), make_case())
    finally:
        torch.use_deterministic_algorithms(False)
