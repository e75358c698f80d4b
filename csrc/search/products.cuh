// Products of codes with queries on tensor cores, of one bit or of bytes: what one warp makes of rows of both. Lanes
// may take the dimensions in any order in which both operands take them, so a lane reads 16 neighbouring bytes of a
// row.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/device_reduce.cuh"
#include "common/tensor_core.cuh"
#include "search/search_cuda.hpp"

namespace fastembed::search::cuda {

using device::warp_threads;

constexpr int piece_bytes = 16;
constexpr int step_bytes = 4 * piece_bytes;  // of a row, read by four lanes at a time
constexpr int operand_codes = 16;
constexpr int operand_queries = 8;

// What is multiplied, and whether its rows and planes begin at pieces.
struct Operands {
  Codes queries;
  Codes codes;
  Metric metric;
  bool vectorised;
};

struct Piece {
  uint32_t words[piece_bytes / 4];
};

// Bytes `offset` .. of a plane, byte by byte; zeros past its end.
static __device__ __noinline__ uint4 load_bytes(const uint8_t* plane, int64_t offset, int64_t bytes) {
  const auto word = [&](int64_t first) {
    uint32_t joined = 0;
    for (int i = 0; i < 4; ++i) {
      if (first + i < bytes) joined |= static_cast<uint32_t>(plane[first + i]) << 8 * i;
    }
    return joined;
  };
  return make_uint4(word(offset), word(offset + 4), word(offset + 8), word(offset + 12));
}

__device__ inline Piece load_piece(const uint8_t* plane, int64_t offset, int64_t bytes, bool vectorised) {
  uint4 vector = make_uint4(0, 0, 0, 0);
  if (vectorised && offset + piece_bytes <= bytes) {
    vector = *reinterpret_cast<const uint4*>(plane + offset);
  } else if (offset < bytes) {
    vector = load_bytes(plane, offset, bytes);
  }
  return {{vector.x, vector.y, vector.z, vector.w}};
}

// One-bit products of binary codes: 256 dimensions at a time.
struct BitProducts {
  static constexpr int planes = 1;
  static constexpr int code_operands = 2;
  static constexpr int many_queries = 4;  // operands of them, as registers allow
  static constexpr int steps = 2;         // mma per piece
  static constexpr uint32_t ones = ~0u;

  __device__ static uint32_t operand(const Piece (&piece)[1], int step, int half) {
    return piece[0].words[2 * step + half];
  }
  __device__ static void multiply(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    device::mma_b1_and(d, a, b);
  }
};

// Byte products of codes of some bits: 32 dimensions at a time, spread from a bit to a byte each.
template <int bits>
struct ByteProducts {
  static constexpr int planes = bits;
  static constexpr int code_operands = 1;
  static constexpr int many_queries = bits <= 2 ? 4 : 2;
  static constexpr int steps = 16;
  static constexpr uint32_t ones = 0x01010101u;

  __device__ static uint32_t operand(const Piece (&pieces)[bits], int step, int half) {
    uint32_t codes = 0;
#pragma unroll
    for (int plane = 0; plane < bits; ++plane) {
      const uint32_t word = pieces[plane].words[step / 4] >> (step % 4 * 2 + half);
      codes |= (word & ones) << (bits - 1 - plane);
    }
    return codes;
  }
  __device__ static void multiply(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    device::mma_u8_s8(d, a, b);
  }
};

// Products of the warp's codes (rows) with queries (columns), and the sums of the codes.
template <class Products, int query_operands>
struct Tile {
  int dots[Products::code_operands][query_operands][4];
  int code_sums[Products::code_operands][4];
};

// The row of a matrix of codes that a lane reads, or none.
struct Row {
  const uint8_t* data;
  int64_t bytes;  // of a plane; 0 for none
};

__device__ inline Row row_of(const Codes& codes, int64_t index, int64_t end, int64_t plane_bytes) {
  return {codes.data + (index < end ? index : 0) * codes.stride, index < end ? plane_bytes : 0};
}

template <class Products>
__device__ inline void load_row(const Row& row, int64_t offset, int64_t plane_bytes, bool vectorised,
                                Piece (&pieces)[Products::planes]) {
#pragma unroll
  for (int plane = 0; plane < Products::planes; ++plane) {
    pieces[plane] = load_piece(row.data + plane * plane_bytes, offset, row.bytes, vectorised);
  }
}

// One pass over the codes from `first_code` on and the queries from `first_query` on. With `of_queries`, the products
// are those of ones with the queries: the sums of the queries.
template <class Products, int query_operands>
__device__ void multiply(const Operands& of, int64_t first_code, int64_t code_end, int64_t first_query, bool of_queries,
                         Tile<Products, query_operands>& tile) {
  memset(&tile, 0, sizeof(tile));
  const int lane = threadIdx.x % warp_threads;
  const int group = lane / 4;
  const int64_t plane_bytes = of.metric.plane_bytes;
  const uint32_t all_ones[4] = {Products::ones, Products::ones, Products::ones, Products::ones};
  const uint32_t ones[2] = {Products::ones, Products::ones};
  Row code_rows[Products::code_operands][2];
  Row query_rows[query_operands];
#pragma unroll
  for (int m = 0; m < Products::code_operands; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = first_code + operand_codes * m + 8 * half + group;
      code_rows[m][half] = row_of(of.codes, row, of_queries ? 0 : code_end, plane_bytes);
    }
  }
#pragma unroll
  for (int n = 0; n < query_operands; ++n) {
    query_rows[n] = row_of(of.queries, first_query + operand_queries * n + group, of.queries.rows, plane_bytes);
  }
#pragma unroll 1
  for (int64_t offset = lane % 4 * piece_bytes; offset - lane % 4 * piece_bytes < plane_bytes; offset += step_bytes) {
    Piece codes[Products::code_operands][2][Products::planes];
    Piece queries[query_operands][Products::planes];
#pragma unroll
    for (int m = 0; m < Products::code_operands; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        load_row<Products>(code_rows[m][half], offset, plane_bytes, of.vectorised, codes[m][half]);
      }
    }
#pragma unroll
    for (int n = 0; n < query_operands; ++n) {
      load_row<Products>(query_rows[n], offset, plane_bytes, of.vectorised, queries[n]);
    }
#pragma unroll
    for (int step = 0; step < Products::steps; ++step) {
      uint32_t b[query_operands][2];
#pragma unroll
      for (int n = 0; n < query_operands; ++n) {
        b[n][0] = Products::operand(queries[n], step, 0);
        b[n][1] = Products::operand(queries[n], step, 1);
      }
#pragma unroll
      for (int m = 0; m < Products::code_operands; ++m) {
        uint32_t a[4];
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          a[r] = of_queries ? all_ones[r] : Products::operand(codes[m][r % 2], step, r / 2);
        }
#pragma unroll
        for (int n = 0; n < query_operands; ++n) Products::multiply(tile.dots[m][n], a, b[n]);
        Products::multiply(tile.code_sums[m], a, ones);
      }
    }
  }
}

}  // namespace fastembed::search::cuda
