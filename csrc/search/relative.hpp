// Relative representations: cosines of embeddings to anchors.
#pragma once

#include <cstdint>

#include "common/dtype.hpp"

namespace fastembed::search {

// out [rows, anchors] = cosines of x [rows, dim] to anchors [anchors, dim], all of one dtype; 0 for vectors shorter
// than 1e-12 times a unit vector's share, as PyTorch's normalize has it: x / max(|x|, 1e-12).
void relative_representations(const void* x, int64_t rows, const void* anchors, int64_t anchor_rows, int64_t dim,
                              DType dtype, void* out, int threads);

}  // namespace fastembed::search
