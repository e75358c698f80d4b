"""Tensors and settings in one safetensors file, replaced whole or not at all."""

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._atomic import replacing

# The metadata of a file: settings as JSON, and the CRC-32 of them and of all tensors.
_SETTINGS, _CHECKSUM = "fastembed", "crc32"


def write_safetensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> None:
    """Write tensors, and settings that JSON can hold, to a temporary file beside `path`, sync it and rename it."""
    from safetensors.torch import save

    # Each tensor with memory of its own: safetensors refuses shared memory.
    owned = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(dict(settings))
    data = save(owned, {_SETTINGS: text, _CHECKSUM: _checksum(text, owned)})
    with replacing(path) as file:
        file.write(data)


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
    crc = zlib.crc32(text.encode())
    for name, tensor in sorted(tensors.items()):
        crc = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"
