from collections.abc import Sequence

import numpy as np

def isa() -> str: ...
def best_isa() -> str: ...
def max_threads() -> int: ...
def requested_backend() -> str: ...
def isa_levels() -> list[str]: ...
def set_isa(name: str) -> None: ...
def pool_exits(
    exits: Sequence[tuple[int, int, int, Sequence[tuple[int, int]]]],
    sequences: int,
    tokens: int,
    mask: tuple[int, int, int, int, int, int] | None,
    cu_seqlens: tuple[int, int, bool] | None,
    mode: int,
    dtype: int,
    out_type: int,
    normalize: bool,
    states: Sequence[tuple[int, int]],
    threads: int,
) -> None: ...
def pool_modes(
    exits: Sequence[tuple[int, int, int, Sequence[tuple[int, int]]]],
    sequences: int,
    tokens: int,
    mask: tuple[int, int, int, int, int, int] | None,
    cu_seqlens: tuple[int, int, bool] | None,
    modes: Sequence[int],
    dtype: int,
    out_type: int,
    normalize: bool,
    sizes: Sequence[int],
    threads: int,
) -> None: ...
def pool_exits_backward(
    exits: Sequence[tuple[int, int, tuple[int, int], Sequence[tuple[int, int]]]],
    sequences: int,
    tokens: int,
    mask: tuple[int, int, int, int, int, int] | None,
    cu_seqlens: tuple[int, int, bool] | None,
    mode: int,
    dtype: int,
    prefix_dtype: int,
    normalize: bool,
    threads: int,
) -> None: ...
def address(array: np.ndarray) -> int: ...
def pack_bits(x: int, dtype: int, rows: int, dim: int, thresholds: int, codes: int, threads: int) -> None: ...
def hamming_topk(
    queries: int,
    query_rows: int,
    query_stride: int,
    codes: int,
    code_rows: int,
    code_stride: int,
    bytes: int,
    selection: tuple[int, int, int, int],
    k: int,
    distances: int,
    ids: int,
    threads: int,
) -> None: ...

class RangeResult:
    @property
    def total(self) -> int: ...
    def write(self, lims: int, distances: int, ids: int) -> None: ...

def hamming_range(
    queries: int,
    query_rows: int,
    query_stride: int,
    codes: int,
    code_rows: int,
    code_stride: int,
    bytes: int,
    selection: tuple[int, int, int, int],
    radius: int,
    threads: int,
) -> RangeResult: ...
def scalar_encode(
    x: int,
    dtype: int,
    rows: int,
    dim: int,
    centroid: int,
    signs: int,
    bits: int,
    method: int,
    metric: int,
    codes: int,
    factors: int,
    threads: int,
) -> int: ...
def scalar_topk(
    queries: int,
    query_factors: int,
    query_rows: int,
    query_stride: int,
    query_bits: int,
    codes: int,
    factors: int,
    code_rows: int,
    code_stride: int,
    bits: int,
    dim: int,
    selection: tuple[int, int, int, int],
    k: int,
    scores: int,
    ids: int,
    threads: int,
) -> None: ...
def sdc_encode(x: int, rows: int, dim: int, bits: int, codes: int, inverse_norms: int, threads: int) -> int: ...
def sdc_topk(
    queries: int,
    query_inverse_norms: int,
    query_rows: int,
    query_stride: int,
    codes: int,
    inverse_norms: int,
    code_rows: int,
    code_stride: int,
    dim: int,
    bits: int,
    selection: tuple[int, int, int, int],
    k: int,
    scores: int,
    ids: int,
    threads: int,
) -> None: ...
def lists_topk(
    queries: int,
    query_inverse_norms: int,
    query_rows: int,
    query_stride: int,
    codes: int,
    inverse_norms: int,
    code_rows: int,
    code_stride: int,
    dim: int,
    bits: int,
    centroids: int,
    lists: int,
    starts: int,
    ids: int,
    probed: int,
    probes: int,
    k: int,
    values: int,
    rows: int,
    threads: int,
) -> None: ...
def rescore(
    queries: int,
    rows: int,
    documents: int,
    dim: int,
    candidates: int,
    count: int,
    k: int,
    scores: int,
    ids: int,
    threads: int,
) -> None: ...
def fde(
    tokens: int,
    offsets: int,
    sequences: int,
    hyperplanes: int,
    projections: int,
    buckets: int,
    signs: int,
    dim: int,
    repetitions: int,
    bits: int,
    projected: int,
    final_dim: int,
    documents: bool,
    out: int,
    threads: int,
) -> int: ...
def relative_representations(
    x: int, rows: int, anchors: int, anchor_rows: int, dim: int, dtype: int, out: int, threads: int
) -> None: ...

class QLinear:
    def __init__(
        self,
        in_features: int,
        out_features: int,
        codes: int,
        scales: int,
        scale_dtype: int,
        zeros: int,
        zero_kind: int,
        bits: int,
        group_size: int,
        bias: int,
        bias_dtype: int,
        epilogue: int,
        activations: int,
    ) -> None: ...
    def __call__(self, x: int, dtype: int, rows: int, row_stride: int, residual: int, y: int, threads: int) -> None: ...

def qlinears(
    layers: list[tuple[QLinear, int]], x: int, dtype: int, rows: int, row_stride: int, threads: int
) -> None: ...
def latent_attend(
    x: int,
    dtype: int,
    stride: int,
    first: int,
    rows: int,
    features: int,
    offsets: int,
    score_panels: int,
    score_bias: int,
    value_panels: int,
    weight_dtype: int,
    width: int,
    heads: int,
    eps: float,
    normalized: int,
    y_sums: int,
    threads: int,
) -> None: ...
def latent_feed_forward(
    normalized: int,
    first: int,
    rows: int,
    features: int,
    offsets: int,
    panels: int,
    weight_dtype: int,
    bias: int,
    hidden: int,
    gated_sums: int,
    threads: int,
) -> None: ...
def latent_gate(
    values: int,
    gates: int,
    stride: int,
    first: int,
    rows: int,
    columns: int,
    offsets: int,
    gated_sums: int,
    sums_stride: int,
    threads: int,
) -> None: ...
def latent_to_panels(
    weight: int, out_features: int, in_features: int, gated: bool, dtype: int, panels: int, threads: int
) -> None: ...
