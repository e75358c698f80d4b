"""What every op's CUDA launcher needs from PyTorch."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def current_stream(device: torch.device) -> Iterator[int]:
    """PyTorch's current stream of `device`, as the integer that launchers take, with that device made current.

    A CPU device stands for the simulated one of tests/cuda_on_cpu, whose only stream is 0.
    """
    if device.type == "cpu":
        yield 0
        return
    with torch.cuda.device(device):
        yield torch.cuda.current_stream(device).cuda_stream
