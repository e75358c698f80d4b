"""What is shipped: the source distribution builds by itself, and the wheel claims no name but `fastembed`."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    code = f"from setuptools.build_meta import build_sdist; build_sdist({str(folder)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    return next(folder.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the source distribution alone, without CUDA, and not optimised, which takes minutes."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "-q",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            str(folder),
            str(sdist),
        ],
        env={**os.environ, "FASTEMBED_CUDA": "0", "CXXFLAGS": "-O0"},
        check=True,
    )
    return next(folder.glob("*.whl"))


def test_sdist_has_the_kernels_of_every_kind(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    expected = {
        "csrc/bindings.cpp",
        "csrc/common/isa.hpp",
        "csrc/pooling/pooling.cu",
        "triton_kernels/pooling.py",
        "LICENSE",
    }
    assert expected <= names


def test_wheel_claims_one_import_name(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    top_level = {name.partition("/")[0] for name in names}
    assert {name for name in top_level if not name.endswith(".dist-info")} == {"fastembed"}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "fastembed").rglob("*.py")}
    assert sources | {"fastembed/py.typed", "fastembed/_core.pyi", "fastembed/triton_kernels/pooling.py"} <= set(names)


def test_wheel_works_without_pytorch(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = """
import sys
sys.modules["torch"] = None  # any import of it raises ModuleNotFoundError
import numpy as np, fastembed
codes = fastembed.pack_bits(np.eye(16, dtype=np.float32))
distances, ids = fastembed.hamming_topk(codes, codes, 1)
assert fastembed.__file__.startswith(sys.argv[1]), fastembed.__file__
assert ids[:, 0].tolist() == list(range(16)) and not distances.any()
"""
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        check=True,
    )
