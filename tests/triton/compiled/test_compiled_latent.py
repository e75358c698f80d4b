"""The Triton latent-attention kernels, compiled for real architectures by the calls that launch them."""

import pytest

from bench.static import KernelResources
from bench.static.triton import rows

INSTRUCTIONS = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}


@pytest.fixture(scope="module")
def table(arch: int) -> list[KernelResources]:
    return rows("latent", archs=[arch])


def test_nothing_spills(table: list[KernelResources]) -> None:
    assert [row for row in table if row.spill_bytes or row.stack_bytes] == []


def test_products_run_on_tensor_cores(table: list[KernelResources], arch: int) -> None:
    instruction = INSTRUCTIONS[arch]
    wide = [row for row in table if "heads of 4096, bfloat16" in row.kernel]
    assert len(wide) == 3
    assert all(f" {instruction}" in row.notes for row in wide)
    assert all(" HMMA" in row.notes for row in table if "folded, bfloat16" in row.kernel)


def test_nothing_is_added_atomically(table: list[KernelResources]) -> None:
    assert [row for row in table if "ATOM" in row.notes or "RED" in row.notes] == []
