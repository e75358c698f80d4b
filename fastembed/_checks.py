"""What functions of every family ask of their arguments: kind, dtype, rank, device and range.

Arrays and tensors are checked alike, by the attributes they share; PyTorch need not be installed.
"""

from typing import Any

import numpy as np

from . import _native, backends

INTEGERS = (int, np.integer) if _native.torch is None else (int, np.integer, _native.torch.SymInt)


def _dtypes(*names: str) -> frozenset[Any]:
    """The dtypes of these names in NumPy, in native byte order, and in PyTorch."""
    modules = [module for module in (np, _native.torch) if module is not None]
    found = [getattr(module, name) for module in modules for name in names if hasattr(module, name)]
    return frozenset(np.dtype(dtype) if isinstance(dtype, type) else dtype for dtype in found)


FLOATS = _dtypes("float32", "float16", "bfloat16", "float64")
FLOAT32 = _dtypes("float32")
UINT8 = _dtypes("uint8")
MASKS = _dtypes("bool", "uint8")
INT64 = _dtypes("int64")
OFFSETS = _dtypes("int32", "int64")


def are_tensors(**inputs: Any) -> bool:
    """Whether the inputs are tensors (rather than arrays). Raises TypeError for anything else, or some of each."""
    kinds = {_is_tensor(name, value) for name, value in inputs.items()}
    if len(kinds) > 1:
        raise TypeError(f"{' and '.join(inputs)} must be all NumPy arrays or all tensors, got both")
    tensors = kinds.pop()
    if not tensors and (backend := backends.forced_backend()) not in (None, "cpu"):
        raise TypeError(f"{' and '.join(inputs)} must be tensors for backend {backend!r}, got NumPy arrays")
    return tensors


def _is_tensor(name: str, value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return False
    if _native.torch is not None and isinstance(value, _native.torch.Tensor):
        return True
    raise TypeError(f"{name} must be a NumPy array or a tensor, got {type(value).__name__}")


def check_array(name: str, value: Any, ndim: int, dtypes: frozenset[Any], axes: str | None = None) -> None:
    """Check dtype and rank; `axes` are their names in the message."""
    check_dtype(name, value, dtypes)
    if value.ndim != ndim:
        expected = axes or ("[rows]", "[rows, columns]")[ndim - 1]
        raise ValueError(f"{name} must have shape {expected}, got {list(value.shape)}")


def check_dtype(name: str, value: Any, dtypes: frozenset[Any]) -> None:
    if value.dtype not in dtypes:
        names = " or ".join(sorted({str(dtype).removeprefix("torch.") for dtype in dtypes}))
        raise TypeError(f"{name} must be {names}, got {value.dtype}")


def check_device(reference: Any, other: Any, name: str, of: str = "the queries") -> None:
    if hasattr(reference, "device") and reference.device != other.device:
        raise ValueError(f"{name} must be on the device of {of}, {reference.device}, got {other.device}")


def check_integer(name: str, value: Any, smallest: int, largest: int | None = None) -> Any:
    """The value, as Python's own integer where it is one of NumPy's: those overflow, and JSON does not take them."""
    if isinstance(value, bool) or not isinstance(value, INTEGERS):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < smallest or (largest is not None and value > largest):
        expected = f"at least {smallest}" if largest is None else f"between {smallest} and {largest}"
        raise ValueError(f"{name} must be {expected}, got {value}")
    return int(value) if isinstance(value, np.integer) else value


def check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if np.isnan(value):
        raise ValueError(f"{name} must be a number, got NaN")


def check_positive(name: str, value: Any) -> None:
    check_number(name, value)
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} must be positive and finite, got {value}")


def check_not_negative(name: str, value: Any) -> None:
    check_number(name, value)
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name} must be at least 0 and finite, got {value}")


def raise_not_finite(row: int, name: str = "x") -> None:
    """Raise ValueError unless `row`, the first row found not to be finite, is -1."""
    if row >= 0:
        raise ValueError(f"{name} must be finite, got a NaN or infinity in row {row}")


def check_finite(x: Any, name: str = "x") -> None:
    """Raise ValueError naming the first row of a tensor [N, D] that has a NaN or infinity."""
    bad = (~x.isfinite().all(dim=1)).nonzero()
    raise_not_finite(int(bad[0]) if len(bad) else -1, name)
