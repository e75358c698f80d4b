// Relative representations: cosines of embeddings to anchors.
#pragma once

#include <cstdint>

#include "common/dtype.hpp"

namespace fastembed::search {

// out [rows, anchors] = cosines of x [rows, dim] to anchors [anchors, dim], all of one dtype. Vectors are brought to
// unit length as PyTorch's normalize does it, v / max(|v|, 1e-12), so that zeros have cosine 0.
void relative_representations(const void* x, int64_t rows, const void* anchors, int64_t anchor_rows, int64_t dim,
                              DType dtype, void* out, int threads);

}  // namespace fastembed::search
