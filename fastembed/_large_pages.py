"""Memory in pages of 2 MB for weights, which are read whole, again and again.

Reading memory that no cache holds in pages of 4 KB waits for as many translations. Tensors follow each other in chunks
of many such pages, since most are smaller than one; a chunk goes when the last of its tensors does.
"""

import mmap
import threading
from contextlib import suppress

import torch
from torch import Tensor

CHUNK_BYTES = 32 << 20
# Smaller tensors have few pages either way.
SMALLEST_BYTES = 64 << 10
_PAGE_BYTES = 2 << 20
_ALIGNMENT = 64

_lock = threading.Lock()
_chunk: Tensor | None = None
_used = 0


def in_large_pages(tensor: Tensor) -> Tensor:
    """A copy in such memory, or the tensor itself where that would bring nothing: not on a CPU, or small."""
    if type(tensor) is not Tensor or not tensor.is_cpu or tensor.nbytes < SMALLEST_BYTES:
        return tensor
    # A chunk mapped in inference mode would make tensors of that kind of all that are put there later.
    with torch.inference_mode(False), torch.no_grad():
        place = _reserve(tensor.nbytes).view(tensor.dtype).view(tensor.shape)
        return place.copy_(tensor)


def _reserve(nbytes: int) -> Tensor:
    """Bytes of a chunk, which lasts as long as they do."""
    global _chunk, _used
    with _lock:
        if _chunk is None or _used + nbytes > _chunk.numel():
            if nbytes > CHUNK_BYTES // 2:
                return _map(nbytes)  # and the rest of the present chunk stays in use
            _chunk, _used = _map(CHUNK_BYTES), 0
        bytes_ = _chunk[_used : _used + nbytes]
        _used += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        return bytes_


def _map(nbytes: int) -> Tensor:
    """uint8 [nbytes] from the beginning of a large page on."""
    pages = mmap.mmap(-1, nbytes + _PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(AttributeError, OSError):  # systems without them
        pages.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(pages, dtype=torch.uint8)
    first = -memory.data_ptr() % _PAGE_BYTES
    return memory[first : first + nbytes]
