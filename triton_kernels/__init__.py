"""Triton kernels, one file per family; installed as `fastembed.triton_kernels`. Importing this imports no Triton."""
