"""Runs the CUDA kernels on the CPU: the very .cu files, compiled by g++ against a small model of the execution model.

    pytest tests/cuda_on_cpu              values in three thread orders, a sanitized selection, the harness's own tests
    pytest tests/cuda_on_cpu -m slow      everything under AddressSanitizer + UBSan and under ThreadSanitizer

`rewriter.py` turns the CUDA syntax into C++, `shim/` is the simulated machine (machine.hpp says what it models and
reports), `build.py` compiles both into a module that takes the place of `fastembed._cuda`.

A new family needs nothing here but its tests, unless it uses PTX. PTX belongs in headers of csrc/common that hold
nothing else; the harness then gets a header of the same name with the same functions, written for the simulated
machine, in shim/common, which stands before csrc on the include path. There are two: tensor_core.cuh (mma, ldmatrix)
and async_copy.cuh (cp.async). A kernel that uses the latter is tested with the fixtures `thread_order` and `copies`:
no single mode finds every bug.
"""
