"""Triton's CPU interpreter, mended where it computes something else than a GPU, and made strict about memory.

Mended (seen in Triton 3.7 and 3.9):
- bfloat16 is held as `ml_dtypes.bfloat16`. Upstream holds its bit pattern in a uint16 and computes with that integer,
  without an error; casts to bfloat16 truncate. Now every operation and cast rounds to nearest, ties to even.
- A comparison is an int1. Upstream leaves the type of its operands on it, so a scalar condition cannot be broadcast.
- `tl.maximum` and `tl.minimum` ignore a NaN unless told to propagate it. Triton 3.7 always propagates.
- `triton.language` is patched once. Upstream patches it again at every call of a device function, 1 to 2 ms each.

Strict, where a GPU would read garbage, corrupt memory or give varying results without a word:
- a load, store or atomic outside the elements of the tensors passed to the kernel, gaps of a strided view included;
- two programs that store to one element, two lanes of one store that do, and a program that loads what another stores
  in the same launch (atomics are exempt);
- lanes masked off by a load without `other` hold NaN, or the largest integer;
- programs run in a shuffled order, another one for each seed.
"""

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

Handle = interpreter.TensorHandle

DEFAULT_SEED = 1
NOBODY, SEVERAL = -1, -2

_upstream_np_dtype = interpreter._get_np_dtype
_upstream_patch_lang = interpreter._patch_lang


class InvalidAccess(Exception):
    """A kernel touches memory that none of its arguments owns."""


class Race(Exception):
    """Programs of one launch touch the same element, and at least one of them stores to it."""


def install() -> None:
    """Make every Triton kernel of this process run in the interpreter of this module."""
    interpreter._get_np_dtype = _np_dtype
    interpreter.interpreter_builder = StrictBuilder()
    interpreter.interpreter_semantic = interpreter.TritonSemantic(interpreter.interpreter_builder)
    interpreter.GridExecutor = StrictExecutor
    _upstream_patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda function: interpreter._LangPatchScope()


@contextmanager
def program_order(seed: int | None) -> Iterator[None]:
    """Run the programs of each launch in the order that the seed shuffles them into; None: by program id."""
    builder = interpreter.interpreter_builder
    before, builder.seed = builder.seed, seed
    try:
        yield
    finally:
        builder.seed = before


class StrictExecutor(interpreter.GridExecutor):
    """Runs one launch, after telling the builder which tensors the kernel may touch."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        with np.errstate(all="ignore"):  # a GPU overflows in silence
            super().__call__(*args, **kwargs)

    def _init_args_hst(self, args: Any, kwargs: Any) -> Any:
        args, kwargs = super()._init_args_hst(args, kwargs)
        interpreter.interpreter_builder.memory = Memory(_tensors([*args, *kwargs.values()]))
        return args, kwargs


class StrictBuilder(interpreter.InterpreterBuilder):
    """The operations of a kernel, on NumPy arrays."""

    def __init__(self) -> None:
        super().__init__()
        self.seed: int | None = DEFAULT_SEED
        self.memory = Memory([])

    # Order of programs

    def set_grid_dim(self, *dims: int) -> None:
        super().set_grid_dim(*dims)
        self._order = list(np.ndindex(*dims))
        if self.seed is not None:
            random.Random(self.seed).shuffle(self._order)

    def set_grid_idx(self, x: int, y: int, z: int) -> None:
        turn = np.ravel_multi_index((x, y, z), self.grid_dim)
        super().set_grid_idx(*self._order[turn])
        self.memory.program = int(np.ravel_multi_index(self.grid_idx, self.grid_dim))

    # Values

    def binary_op(self, lhs: Handle, rhs: Handle, op: Any) -> Handle:
        result = super().binary_op(lhs, rhs, op)
        if result.data.dtype == np.bool_:
            result.dtype = tl.int1
        return result

    def create_maxnumf(self, lhs: Handle, rhs: Handle) -> Handle:
        return self.binary_op(lhs, rhs, np.fmax)

    def create_minnumf(self, lhs: Handle, rhs: Handle) -> Handle:
        return self.binary_op(lhs, rhs, np.fmin)

    def cast_impl(self, src: Handle, dst_type: tl.dtype) -> Handle:
        return Handle(src.data.astype(_np_dtype(dst_type)), dst_type.scalar)

    def create_fp_to_fp(self, src: Handle, dst_type: tl.dtype, rounding: Any) -> Handle:
        formats = (tl.float16, tl.bfloat16, tl.float32, tl.float64)
        to_nearest = rounding != interpreter._ir.ROUNDING_MODE.RTZ
        if to_nearest and src.dtype.scalar in formats and dst_type.scalar in formats:
            return self.cast_impl(src, dst_type)
        return super().create_fp_to_fp(src, dst_type, rounding)

    def create_dot(self, a: Handle, b: Handle, d: Handle, precision: Any, max_num_imprecise_acc: Any) -> Handle:
        a, b = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return super().create_dot(a, b, d, precision, max_num_imprecise_acc)

    # Memory

    def create_masked_load(self, ptrs: Handle, mask: Handle, other: Handle | None, *policy: Any) -> Handle:
        self.memory.check_load(ptrs.data, mask.data)
        dtype = _np_dtype(ptrs.get_element_ty())
        elsewhere = np.full(ptrs.data.shape, _poison(dtype), dtype) if other is None else other.data
        bits = np.dtype(f"u{dtype.itemsize}")
        values = interpreter._interpreter.load(ptrs.data, mask.data, elsewhere.view(bits), bits)
        return Handle(values.view(dtype), ptrs.get_element_ty())

    def create_masked_store(self, ptrs: Handle, value: Handle, mask: Handle, *policy: Any) -> None:
        self.memory.check_store(ptrs.data, mask.data)
        bits = np.dtype(f"u{value.data.dtype.itemsize}")
        interpreter._interpreter.store(ptrs.data, np.ascontiguousarray(value.data).view(bits), mask.data)

    def create_atomic_rmw(self, op: Any, ptr: Handle, val: Handle, mask: Handle, *order: Any) -> Handle:
        self.memory.check_atomic(ptr.data, mask.data)
        return super().create_atomic_rmw(op, ptr, val, mask, *order)

    def create_atomic_cas(self, ptr: Handle, cmp: Handle, val: Handle, *order: Any) -> Handle:
        self.memory.check_atomic(ptr.data, np.ones(ptr.data.shape, bool))
        return super().create_atomic_cas(ptr, cmp, val, *order)


class Memory:
    """What one launch may touch, and which program touched what."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self.regions = [Region(tensor) for tensor in tensors if tensor.numel() > 0]
        self.program = 0

    def check_load(self, addresses: np.ndarray, mask: np.ndarray) -> None:
        for region, elements in self._locate("load", addresses, mask):
            if (writer := region.other_writer(elements, self.program)) is not None:
                raise Race(f"program {self.program} loads what program {writer} stores in the same launch")
            region.note_readers(elements, self.program)

    def check_store(self, addresses: np.ndarray, mask: np.ndarray) -> None:
        for region, elements in self._locate("store", addresses, mask):
            if np.unique(elements).size != elements.size:
                raise Race(f"two lanes of one store in program {self.program} hit the same element")
            if (writer := region.other_writer(elements, self.program)) is not None:
                raise Race(f"programs {writer} and {self.program} store to the same element")
            if region.has_other_reader(elements, self.program):
                raise Race(f"program {self.program} stores to what another program loads in the same launch")
            region.writers[elements] = self.program

    def check_atomic(self, addresses: np.ndarray, mask: np.ndarray) -> None:
        for _ in self._locate("atomic", addresses, mask):
            pass

    def _locate(self, kind: str, addresses: np.ndarray, mask: np.ndarray) -> "Iterator[tuple[Region, np.ndarray]]":
        """The touched regions and the indices of the elements touched in them; InvalidAccess if any is elsewhere."""
        touched = np.broadcast_to(addresses, mask.shape)[mask].astype(np.int64)
        missing = touched
        for region in self.regions:
            inside, elements = region.find(missing)
            if elements.size:
                yield region, elements
                missing = missing[~inside]
        if missing.size:
            lanes = f"{missing.size} of {touched.size} lanes"
            raise InvalidAccess(f"{kind} outside every tensor passed: {lanes}, program {self.program}")


class Region:
    """The elements of one tensor."""

    def __init__(self, tensor: torch.Tensor) -> None:
        extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        owned = torch.zeros(extent, dtype=torch.bool)
        owned.as_strided(tensor.shape, tensor.stride()).fill_(True)
        self.start = tensor.data_ptr()
        self.itemsize = tensor.element_size()
        self.owned = owned.numpy()
        self.writers = np.full(extent, NOBODY)
        self.readers = np.full(extent, NOBODY)

    def find(self, addresses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which of the addresses are elements of this tensor (a misaligned address is none), and their indices."""
        elements, misaligned = np.divmod(addresses - self.start, self.itemsize)
        inside = (misaligned == 0) & (elements >= 0) & (elements < self.owned.size)
        inside[inside] = self.owned[elements[inside]]
        return inside, elements[inside]

    def other_writer(self, elements: np.ndarray, program: int) -> int | None:
        writers = self.writers[elements]
        others = writers[(writers != NOBODY) & (writers != program)]
        return int(others[0]) if others.size else None

    def has_other_reader(self, elements: np.ndarray, program: int) -> bool:
        readers = self.readers[elements]
        return bool(((readers != NOBODY) & (readers != program)).any())

    def note_readers(self, elements: np.ndarray, program: int) -> None:
        before = self.readers[elements]
        self.readers[elements] = np.where((before == NOBODY) | (before == program), program, SEVERAL)


def _np_dtype(dtype: tl.dtype) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16) if dtype.scalar == tl.bfloat16 else _upstream_np_dtype(dtype)


def _poison(dtype: np.dtype) -> Any:
    if dtype == np.bool_:
        return True
    return np.iinfo(dtype).max if dtype.kind in "iu" else np.nan


def _tensors(arguments: Iterable[Any]) -> Iterator[torch.Tensor]:
    for argument in arguments:
        if isinstance(argument, tuple):
            yield from _tensors(argument)
        elif isinstance(argument, torch.Tensor):
            yield argument
