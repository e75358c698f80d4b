"""The Triton qmatmul kernels, compiled for real architectures by the calls that launch them, without a GPU."""

import pytest

from bench.static import KernelResources
from bench.static.triton import rows

FEW = "IMMA"
MANY = {80: "IMMA", 90: "IGMMA", 100: "UTCIMMA"}


@pytest.fixture(scope="module")
def table(arch: int) -> list[KernelResources]:
    return rows("qmatmul", archs=[arch])


def test_nothing_spills(table: list[KernelResources]) -> None:
    assert [row for row in table if row.spill_bytes or row.stack_bytes] == []


def test_products_run_on_int8_tensor_cores(table: list[KernelResources], arch: int) -> None:
    for rows_of_x, instruction in (("1 rows", FEW), ("512 rows", MANY[arch])):
        notes = [row.notes for row in table if "multiply" in row.kernel and rows_of_x in row.kernel]
        assert len(notes) == 2
        assert all(f" {instruction}" in note for note in notes)


def test_nothing_is_added_atomically(table: list[KernelResources]) -> None:
    assert [row for row in table if "ATOM" in row.notes or "RED" in row.notes] == []
