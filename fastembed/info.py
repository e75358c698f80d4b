"""What this installation can use, and why not the rest: `fastembed.info()`, `fastembed info`."""

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

from . import _native, backends


@dataclass(frozen=True)
class Info:
    """What `fastembed.info()` found. `str()` of it is the text that `fastembed info` prints.

    Attributes:
        version: Version of fastembed-kernels.
        python: Version of Python.
        torch: Version of PyTorch, or None where it is not installed.
        isa: Instruction-set level that the CPU kernels use: "generic", "avx2", "avxvnni", "avx512" or
            "avx512vnni".
        best_isa: The best level of this CPU; higher than `isa` where FASTEMBED_ISA holds it down.
        threads: Threads that the CPU kernels use.
        cores: CPUs that this process may run on.
        openmp: File names of the OpenMP runtimes loaded. More than one means thread pools that get in each other's way.
        forced_backend: The backend that FASTEMBED_BACKEND or `use_backend` asks for, available or not, or None.
        backends: Backend -> None where it can run, or the reason why it cannot.
        gpus: Names of the GPUs that PyTorch sees.
    """

    version: str
    python: str
    torch: str | None
    isa: str
    best_isa: str
    threads: int
    cores: int
    openmp: tuple[str, ...]
    forced_backend: str | None
    backends: dict[str, str | None]
    gpus: tuple[str, ...]

    def __str__(self) -> str:
        held_down = "" if self.isa == self.best_isa else f" (FASTEMBED_ISA; this CPU has {self.best_isa})"
        lines = {
            "fastembed-kernels": self.version,
            "Python": self.python,
            "PyTorch": self.torch or "not installed",
            "instruction set": self.isa + held_down,
            "threads": f"{self.threads} on {self.cores} CPUs",
            "OpenMP": self._openmp_text(),
            "GPUs": ", ".join(self.gpus) or "none",
            "backend forced": self.forced_backend or "no",
        }
        lines |= {f"backend {name}": reason or "available" for name, reason in self.backends.items()}
        width = max(map(len, lines))
        return "\n".join(f"{name:<{width}}  {text}" for name, text in lines.items())

    def _openmp_text(self) -> str:
        names = ", ".join(self.openmp) or "unknown"
        if len(self.openmp) > 1:
            return f"{names}: {len(self.openmp)} runtimes, whose threads get in each other's way"
        return f"{names}, shared with PyTorch" if self.openmp and self.torch else names


def info() -> Info:
    """What this installation can use: instruction set, threads, backends, and why a backend is missing."""
    from . import __version__

    torch = _native.torch
    return Info(
        version=__version__,
        python=platform.python_version(),
        torch=None if torch is None else torch.__version__,
        isa=_native.core.isa(),
        best_isa=_native.core.best_isa(),
        threads=_native.num_threads() or _native.core.max_threads(),
        cores=len(os.sched_getaffinity(0)),
        openmp=_loaded_openmp_runtimes(),
        forced_backend=backends.requested_backend(),
        backends={name: backends.unavailable_reason(name) for name in backends.BACKENDS},
        gpus=() if torch is None else tuple(map(torch.cuda.get_device_name, range(torch.cuda.device_count()))),
    )


def _loaded_openmp_runtimes() -> tuple[str, ...]:
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return ()
    paths = set(re.findall(r"/\S*/lib(?:gomp|iomp5|omp)\b\S*", maps))
    return tuple(sorted(Path(path).name for path in paths))
