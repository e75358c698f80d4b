#include <immintrin.h>

#include "search/scalar_codes_kernels.hpp"
#include "search/score.hpp"

namespace fastembed::search::avx512vnni {
namespace {

#include "search/dwords_avx512vnni.inl"
#include "search/lookups_avx512vnni.inl"
#include "search/scalar_codes.inl"
#include "search/scalar_lookups.inl"

using Codes = ScalarCodeKernels<Dwords>;

}  // namespace

const ScalarKernels scalar_kernels = {Codes::scan, Codes::lay_out, Codes::offer_rows,
                                      ScalarLookupKernels<LookupBytes>::scan};

}  // namespace fastembed::search::avx512vnni
