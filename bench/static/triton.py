"""Registers, spills, shared memory and instruction counts of the Triton kernels, compiled without a GPU.

The kernels are compiled by the very calls that launch them, on meta tensors, with a stand-in for Triton's GPU driver
that names the architecture. So this is the code a GPU would get, specialisation included; and a launcher that looked at
a value, and so waited for the GPU, would fail here.
"""

import contextlib
import io
import itertools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from unittest import mock

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from fastembed.triton_kernels import latent, pooling, pooling_backward, qmatmul, search

from . import KernelResources

ARCHS = (80, 90, 100)

# Accesses to global memory, by their width in bits; to local memory, which are spills; atomics; tensor-core products.
NOTED = re.compile(r"LDG|STG|LDGSTS|LDL|STL|ATOMG?|REDG?|[IHB]G?MMA|UTC\w*MMA")
WIDTHS = ("128", "64", "U16", "U8", "S8")


def rows(*families: str, archs: Sequence[int] = ARCHS) -> list[KernelResources]:
    """Every kernel (of these families, or of all) in its main variants, for every one of the architectures."""
    return [
        resources(family, variant, kernel, log)
        for family, variant, call in _calls()
        if not families or family in families
        for arch in archs
        for kernel, log in compile_offline(call, arch)
    ]


def _calls() -> Iterator[tuple[str, str, Callable[[], object]]]:
    """(family, variant, a call that launches its kernels) at shapes and alignments as in use."""
    for mode in ("mean", "weightedmean", "max", "cls"):
        yield "pooling", f"{mode}, bfloat16", partial(pool_exits, mode, torch.bfloat16)
    yield "pooling", "max with tokens, bfloat16", partial(pool_exits, "max", torch.bfloat16, keep_state=True)
    for dtype in (torch.int8, torch.uint8):
        name = f"mean, bfloat16 to {str(dtype).removeprefix('torch.')}"
        yield "pooling", name, partial(pool_exits, "mean", torch.bfloat16, out_dtype=dtype)
    for mode, packed in (("mean", False), ("max", True)):
        name = f"{mode}, {'packed' if packed else 'padded'}, bfloat16"
        yield "pooling_backward", name, partial(pool_exits_backward, mode, torch.bfloat16, packed=packed)
    for bits, rows in itertools.product((3, 8), (1, 512)):
        yield "qmatmul", f"{bits} bits, {rows} rows", partial(qlinear, bits, rows)
    for metric, bits, queries, k in (
        ("hamming", 1, 1, 10),
        ("hamming", 1, 64, 100_000),
        ("sdc", 4, 64, 10),
        ("sdc", 8, 64, 1000),
    ):
        name = f"{metric}, {bits} bits, {queries} queries, k {k}"
        yield "search", name, partial(find, metric, bits, queries, k)
    yield "search", "hamming, 1 bits, 64 queries, k 10, filtered", partial(find, "hamming", 1, 64, 10, filtered=True)
    yield "search", "scalar, 8 bits, 64 queries of 15, k 10", partial(find, "scalar", 8, 64, 10, parts=2)
    for dtype in (torch.bfloat16, torch.float32):
        variant = str(dtype).removeprefix("torch.")
        yield "latent", f"folded, {variant}", partial(attend_folded, dtype)
        yield "latent", f"2048 tokens, {variant}", partial(gated_means, dtype)
        yield "latent", f"heads of 4096, {variant}", partial(latent_attention, dtype, 2048, 512, 4096)
        yield "latent", f"learned queries, {variant}", partial(latent_attention, dtype, 64, 2048, 64, True)


BATCH, LENGTH, WIDTH = 64, 512, 768


def pool_exits(
    mode: str,
    dtype: torch.dtype,
    *,
    packed: bool = False,
    out_dtype: torch.dtype | None = None,
    keep_state: bool = False,
) -> list[torch.Tensor]:
    """Pool six exits of a base-size encoder to three dims each, on meta tensors."""
    batch, length, width = BATCH, LENGTH, WIDTH
    with torch.device("meta"):
        hidden_states = [torch.empty(batch, length, width, dtype=dtype) for _ in range(6)]
        mask = torch.empty(batch, length, dtype=torch.int64)
        offsets = torch.empty(batch + 1, dtype=torch.int32)
    tokens = (None, offsets) if packed else (mask, None)
    hidden_states = [hidden.flatten(0, 1) for hidden in hidden_states] if packed else hidden_states
    dims = [[64, 256, width]] * 6
    return pooling.pool_exits(hidden_states, *tokens, mode, dims, True, out_dtype or dtype, keep_state)


def pool_exits_backward(mode: str, dtype: torch.dtype, *, packed: bool = False) -> list[torch.Tensor]:
    """The backward of the same."""
    dims = [[64, 256, WIDTH]] * 6
    with torch.device("meta"):
        state = [torch.empty(BATCH, WIDTH) for _ in range(6)]
        state += [torch.empty(BATCH, WIDTH, dtype=torch.int32) for _ in range(6)] if mode == "max" else []
        grads = [torch.empty(BATCH, dim, dtype=dtype) for exit_dims in dims for dim in exit_dims]
        mask = torch.empty(BATCH, LENGTH, dtype=torch.int64)
        offsets = torch.empty(BATCH + 1, dtype=torch.int32)
    batch = (None, offsets, BATCH * LENGTH) if packed else (mask, None, LENGTH)
    return pooling_backward.pool_exits_backward(state, grads, *batch, [WIDTH] * 6, dtype, mode, dims, True)


def qlinear(bits: int, rows: int, group_size: int = 64) -> torch.Tensor:
    """A base-size feed-forward layer in bfloat16 with GELU, on meta tensors."""
    in_features, out_features = 768, 3072
    panels = out_features // 64
    with torch.device("meta"):
        x = torch.empty(rows, in_features, dtype=torch.bfloat16)
        codes = torch.empty(panels, in_features // 4, 32 * bits, dtype=torch.uint8)
        scales = torch.empty(panels, in_features // group_size, 64, dtype=torch.float16)
        zeros = scales.to(torch.uint8)
        bias = torch.empty(out_features, dtype=torch.bfloat16)
    return qmatmul.qlinear(x, codes, scales, zeros, bias, None, bits, group_size, out_features, "gelu")


def find(
    metric: str, bits: int, rows: int, k: int, *, parts: int | None = None, filtered: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """A search among a million codes of 1024 dims, on meta tensors."""
    count, dim = 1_000_000, 1024
    parts = parts or (2 if metric == "sdc" and bits == 8 else 1)
    columns = {"hamming": None, "sdc": (), "scalar": (4,)}[metric]
    with torch.device("meta"):
        factors = [None if columns is None else torch.empty(size, *columns) for size in (rows, count)]
        query_parts = torch.empty(rows, parts, dim, dtype=torch.int8)
        queries = search.Queries(query_parts, torch.empty(rows, parts, dtype=torch.int32), 2, factors[0])
        mask = torch.empty(count, dtype=torch.uint8) if filtered else None
        ranges = torch.empty(rows, 16, 2, dtype=torch.int64) if filtered else None
        data = torch.empty(count, bits * dim // 8, dtype=torch.uint8)
    return search.find(metric, queries, search.Codes(data, dim // 8, dim, factors[1], mask), bits, ranges, k)


def attend_folded(dtype: torch.dtype) -> torch.Tensor:
    """NV-Embed's folded attention for 2048 tokens, on meta tensors."""
    heads, latents, dim, tokens = 8, 512, 4096, 2048
    with torch.device("meta"):
        normalized = torch.empty(tokens, dim, dtype=dtype)
        weights = torch.empty(heads, latents, dim, dtype=dtype)
        bias = torch.empty(heads, latents)
    return latent.attend_folded(normalized, weights, bias, weights)


def gated_means(dtype: torch.dtype) -> torch.Tensor:
    """What is left of NV-Embed's feed-forward once the product is made, on meta tensors."""
    with torch.device("meta"):
        products = torch.empty(2048, 16384, dtype=dtype)
        bias = torch.empty(16384)
        offsets = torch.empty(5, dtype=torch.int64)
    return latent.gated_means(products, products, bias, bias, offsets)


def latent_attention(
    dtype: torch.dtype, queries: int, keys: int, features: int, masked: bool = False
) -> tuple[torch.Tensor, ...]:
    """Attention of 8 heads and its gradients, on meta tensors."""
    with torch.device("meta"):
        query = torch.empty(1, 8, queries, features, dtype=dtype)
        key = torch.empty(1, 8, keys, features, dtype=dtype)
        keep = torch.empty(1, keys, dtype=torch.bool) if masked else None
    out, lse = latent.attention(query, key, key, keep, 0.125)
    return latent.attention_backward(out, query, key, key, keep, out, lse, 0.125)


class _OfflineDriver:
    """All that Triton asks the driver before a launch: which architecture to compile for."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch  # Triton caches compiled kernels by device: one per architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


def compile_offline(call: Callable[[], object], arch: int) -> list[tuple[CompiledKernel, str]]:
    """Compile, in place of launching, every kernel that `call` launches; each with the assembler's report."""
    if knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET=1 is set: kernels are interpreted in this process and cannot be compiled")
    compiled = []
    launch = JITFunction.run

    def compile_only(function: JITFunction, *args: object, **options: object) -> None:
        log = io.StringIO()
        function.device_caches.pop(arch, None)
        with contextlib.redirect_stdout(log):
            kernel = launch(function, *args, **{**options, "warmup": True})
        compiled.append((kernel, log.getvalue()))

    with (
        tempfile.TemporaryDirectory() as cache,
        mock.patch.object(triton.runtime.driver, "_active", _OfflineDriver(arch)),
        mock.patch.object(JITFunction, "run", compile_only),
        knobs.cache.scope(),
        knobs.nvidia.scope(),
    ):
        knobs.cache.dir = cache
        knobs.nvidia.dump_ptxas_log = True
        call()
    return compiled


def resources(family: str, variant: str, kernel: CompiledKernel, log: str) -> KernelResources:
    """One row, read from the assembler's report and the machine code."""
    (registers,) = re.findall(r"Used (\d+) registers", log)
    # Kernels of one name differ by the switches that are on.
    constants = kernel.src.constants.items()  # by path: the fields of a tuple have longer ones
    switches = [kernel.src.fn.arg_names[path[0]] for path, value in constants if len(path) == 1 and value is True]
    ((stack, stores, loads),) = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill", log)
    return KernelResources(
        kernel=f"{family}.{kernel.metadata.name}[{', '.join([variant, *switches])}]",
        toolchain=f"triton {triton.__version__}",
        arch=f"sm_{kernel.metadata.target.arch}",
        registers=int(registers),
        spill_bytes=int(stores) + int(loads),
        stack_bytes=int(stack),
        shared_bytes=kernel.metadata.shared,
        notes=", ".join(f"{count} {opcode}" for opcode, count in sorted(noted_instructions(kernel).items())),
    )


def noted_instructions(kernel: CompiledKernel) -> Counter[str]:
    """How often each noted opcode stands in the machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        command = [knobs.nvidia.nvdisasm.path, "-c", cubin.name]
        machine_code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    instructions = re.findall(r"\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", machine_code)
    split = [instruction.split(".") for instruction in instructions]
    return Counter(
        ".".join([opcode, *(modifier for modifier in modifiers if modifier in WIDTHS)])
        for opcode, *modifiers in split
        if NOTED.fullmatch(opcode)
    )
