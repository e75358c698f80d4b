#include "search/scalar_codes_kernels.hpp"
#include "search/score.hpp"

namespace fastembed::search::generic {
namespace {

#include "search/dwords_generic.inl"
#include "search/scalar_codes.inl"

using Codes = ScalarCodeKernels<Dwords>;

}  // namespace

const ScalarKernels scalar_kernels = {Codes::scan, Codes::lay_out, Codes::offer_rows, nullptr};

}  // namespace fastembed::search::generic
