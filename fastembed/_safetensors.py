"""Tensors and settings in one safetensors file, replaced whole or not at all."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ._atomic import replacing

_KEY = "fastembed"


def write_safetensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> None:
    """Write tensors, and settings that JSON can hold, to a temporary file beside `path`, sync it and rename it."""
    from safetensors.torch import save

    # Each tensor with memory of its own: safetensors refuses shared memory.
    owned = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    data = save(owned, {_KEY: json.dumps(dict(settings))})
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

    Path(path).stat()  # an absent file is FileNotFoundError, not damage
    try:
        with safe_open(path, framework="pt") as file:
            settings = json.loads((file.metadata() or {})[_KEY])
            return {name: file.get_tensor(name) for name in file.keys()}, settings  # noqa: SIM118
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"path must be an undamaged fastembed safetensors file, got {os.fspath(path)}") from error
