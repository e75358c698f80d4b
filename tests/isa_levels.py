"""The instruction-set levels that the CPU kernels have.

Not in a conftest.py, from which tests cannot import: there are several of that name.
"""

from fastembed._native import core

ISA_LEVELS = ("generic", "avx2", "avx512", "avx512vnni")


def supported_isa_levels() -> tuple[str, ...]:
    """Those of this machine, the lowest first."""
    return ISA_LEVELS[: ISA_LEVELS.index(core.best_isa()) + 1]
