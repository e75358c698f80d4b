"""The instruction-set levels that the CPU kernels have.

Not in a conftest.py, from which tests cannot import: there are several of that name.
"""

from fastembed._native import core


def supported_isa_levels() -> tuple[str, ...]:
    """Those of this machine, each after those it is built on."""
    return tuple(core.isa_levels())
