"""What the compilers say about the GPU kernels, per architecture. Static evidence: nothing is run, nothing is timed."""

from dataclasses import dataclass


@dataclass(frozen=True)
class KernelResources:
    """One kernel compiled for one architecture.

    Attributes:
        kernel: its name, with the variant in brackets.
        toolchain: what compiled it, with the version.
        arch: as NVIDIA names it, "sm_90".
        registers: per thread.
        spill_bytes: stored to and loaded from local memory for lack of registers, per thread.
        stack_bytes: local memory per thread.
        shared_bytes: shared memory per block.
        notes: counts of the instructions that decide the speed.
    """

    kernel: str
    toolchain: str
    arch: str
    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int
    notes: str
