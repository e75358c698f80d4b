"""qmatmul's AVX-VNNI kernels where the CPU has their instruction only as AVX-512 encodes it: the same source, for that.

A CPU with AVX-VNNI runs every test of qmatmul at that level (the fixture `isa`); the instructions in the compiled core
are looked at by test_isa.py.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from fastembed._native import core

TESTS = Path(__file__).parent
CSRC = TESTS.parent / "csrc"
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
AVX2 = ("-mavx2", "-mfma", "-mf16c")


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.skipif("avx512vnni" not in core.isa_levels(), reason="the CPU lacks AVX-512 VNNI")
def test_same_bits_as_avx2(tmp_path: Path) -> None:
    assert COMPILER is not None
    sources = {
        CSRC / "qmatmul/qmatmul_avx2.cpp": AVX2,
        CSRC / "qmatmul/qmatmul_avxvnni.cpp": (*AVX2, "-mavx512vl", "-mavx512vnni"),
        TESTS / "avxvnni_on_avx512.cpp": (),
    }
    objects = []
    for source, flags in sources.items():
        objects.append(str(tmp_path / f"{source.stem}.o"))
        command = [COMPILER, "-std=c++17", "-O2", *flags, f"-I{CSRC}", "-c", str(source), "-o", objects[-1]]
        subprocess.run(command, check=True)
    program = tmp_path / "compare"
    subprocess.run([COMPILER, *objects, "-o", str(program)], check=True)
    listing = subprocess.run(["objdump", "-d", objects[1]], capture_output=True, text=True, check=True).stdout
    assert "vpdpbusd" in listing
    result = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
