// The kernels of an AVX-512 level. Included inside the anonymous namespace of a file latent_<level>.cpp, where
// FASTEMBED_DOT_BF16 is defined if the level has it.

constexpr int vector_bytes = 64;
constexpr int tile_rows = 14;

#define FASTEMBED_LOOK_UP(table, segments)                                                                  \
  reinterpret_cast<Vec>(_mm512_permutex2var_ps(_mm512_loadu_ps(table), reinterpret_cast<__m512i>(segments), \
                                               _mm512_loadu_ps((table) + 16)))

#include "latent/kernels.inl"
