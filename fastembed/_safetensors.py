"""Tensors and settings in one safetensors file, replaced whole or not at all."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._atomic import checksum, replacing

# The metadata of a file: settings as JSON, and the CRC-32 of them and of all tensors.
_SETTINGS, _CHECKSUM = "fastembed", "crc32"

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_safetensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> None:
    """Write tensors, and settings that JSON can hold, to a temporary file beside `path`, sync it and rename it.

    One tensor is read after the other: safetensors' own functions hold a second copy of all of them, and refuse those
    that share memory.

    Raises:
        TypeError: a tensor is sparse, or of a dtype that safetensors files do not have.

    Source: the format, https://huggingface.co/docs/safetensors: the length of the header as 8 bytes, a header in JSON,
    the tensors without gaps. The largest elements come first, so that every tensor is aligned.
    """
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.dtype not in _DTYPES:
            raise TypeError(f"{name} must be dense and of a dtype of safetensors, got {tensor.layout} {tensor.dtype}")
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])))
    text = json.dumps(dict(settings))
    header: dict[str, Any] = {"__metadata__": {_SETTINGS: text, _CHECKSUM: _checksum(text, ordered)}}
    end = 0
    for name, tensor in ordered.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with replacing(path) as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in ordered.values():
            file.write(_bytes_of(tensor))


def open_safetensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a file, memory-mapped.

    Raises:
        ValueError: the file is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    Path(path).stat()  # an absent file is FileNotFoundError, not damage
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"path must be an undamaged fastembed safetensors file, got {os.fspath(path)}") from error
    return tensors


def read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the settings that `write_safetensors` wrote.

    Raises:
        ValueError: the file is not one of those, or is damaged.
    """
    from safetensors import SafetensorError, safe_open

    with open(path, "rb"):  # an absent file or a folder is an OSError, not damage
        pass
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            text = metadata[_SETTINGS]
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        intact = metadata.get(_CHECKSUM) == _checksum(text, tensors)
    except (SafetensorError, KeyError):
        intact = False
    if not intact:
        raise ValueError(f"path must be an undamaged fastembed safetensors file, got {os.fspath(path)}")
    return tensors, json.loads(text)


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    return checksum(
        text,
        (
            (f"{name} {tensor.dtype} {list(tensor.shape)}", _bytes_of(tensor))
            for name, tensor in sorted(tensors.items())
        ),
    )


def _bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's elements in row-major order; a copy only where they do not stand so in the CPU's memory."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
