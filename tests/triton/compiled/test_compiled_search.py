"""The Triton search kernels, compiled for real architectures by the calls that launch them, without a GPU."""

import pytest

from bench.static import KernelResources
from bench.static.triton import rows

PRODUCTS = {80: "IMMA", 90: "IGMMA", 100: "UTCIMMA"}


@pytest.fixture(scope="module")
def table(arch: int) -> list[KernelResources]:
    return rows("search", archs=[arch])


def test_nothing_spills(table: list[KernelResources]) -> None:
    assert [row for row in table if row.spill_bytes or row.stack_bytes] == []


def test_products_run_on_int8_tensor_cores(table: list[KernelResources], arch: int) -> None:
    notes = [row.notes for row in table]
    # Each search finds groups, then their members; but one has so large a k that its groups are the codes themselves.
    assert len(notes) == 11
    assert all(f" {PRODUCTS[arch]}" in note for note in notes)


def test_nothing_is_added_atomically(table: list[KernelResources]) -> None:
    assert [row for row in table if "ATOM" in row.notes or "RED" in row.notes] == []
