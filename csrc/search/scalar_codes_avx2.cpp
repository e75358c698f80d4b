#include <immintrin.h>

#include "search/scalar_codes_kernels.hpp"
#include "search/score.hpp"

namespace fastembed::search::avx2 {
namespace {

#include "search/dwords_avx2.inl"
#include "search/lookups_avx2.inl"
#include "search/scalar_codes.inl"
#include "search/scalar_lookups.inl"

using Codes = ScalarCodeKernels<Dwords>;

}  // namespace

const ScalarKernels scalar_kernels = {Codes::scan, Codes::lay_out, Codes::offer_rows,
                                      ScalarLookupKernels<LookupBytes>::scan};

}  // namespace fastembed::search::avx2
