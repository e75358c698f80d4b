// What the kernels of pooling are told, and how sequences are cut into chunks of tokens.
//
// A chunk has a fixed length, so that a row's result depends neither on scheduling nor on the rest of the batch. Packed
// sequences are found on the device, from the number of tokens and sequences alone: a grid slot per chunk, of which a
// sequence that starts at token s owns those from s / chunk_tokens + its own number on; it can never need more than
// there are before the next sequence's.
#pragma once

#include <cstdint>

#include "common/device_dtype.cuh"
#include "common/device_reduce.cuh"
#include "pooling/pooling.hpp"
#include "pooling/sequences.cuh"

namespace fastembed::pooling::cuda {

using device::full_warp;
using device::vector_size;
using device::warp_threads;

// Each warp of reduce_chunks takes 32 tokens, whose mask fits one ballot.
constexpr int reduce_warps = 4;
constexpr int chunk_tokens = reduce_warps * warp_threads;

struct DeviceExit {
  const void* data;
  int64_t sequence_stride;
  int64_t token_stride;
  int columns;  // that any prefix needs
  int first_prefix;
  int prefixes;
  float* pooled;    // [sequences, columns]
  int32_t* winner;  // the same, if wanted: the token that each largest value is of; -1 without tokens
};

struct DevicePrefix {
  void* data;
  int dim;
};

// The parameters of both kernels. Prefixes rise in dim within an exit.
struct Plan {
  DeviceExit exits[most_exits];
  DevicePrefix prefixes[most_prefixes];
  DeviceBatch batch;
  DType dtype;
  OutputType out_type;
  bool normalize;
  int64_t slots;           // chunks in the grid
  int64_t columns;         // row length of the arrays below
  float* chunk_sums;       // [exits, slots, columns]
  int32_t* chunk_winners;  // the same, when winners are wanted, else null
};
static_assert(sizeof(Plan) <= 4096, "kernel parameters");

__host__ __device__ constexpr int64_t chunks_of(int64_t tokens) { return (tokens + chunk_tokens - 1) / chunk_tokens; }

inline int64_t slot_count(const Batch& batch) {
  if (batch.offsets == nullptr) return batch.sequences * chunks_of(batch.tokens);
  return batch.tokens / chunk_tokens + batch.sequences;
}

__device__ inline int64_t first_slot(const DeviceBatch& batch, int64_t sequence) {
  if (batch.offsets.data == nullptr) return sequence * chunks_of(batch.tokens);
  return offset(batch, sequence) / chunk_tokens + sequence;
}

// The chunk that a slot stands for; empty for the slots that a sequence leaves over.
__device__ inline Span chunk_of_slot(const DeviceBatch& batch, int64_t slot) {
  const int64_t sequence = last_sequence_from(batch, slot, [&](int64_t other) { return first_slot(batch, other); });
  const Span whole = whole_sequence(batch, sequence);
  const int64_t chunk = slot - first_slot(batch, sequence);
  if (chunk < 0) return {sequence, whole.begin, whole.begin};
  const int64_t begin = whole.begin + chunk * chunk_tokens;
  return {sequence, begin, begin + chunk_tokens < whole.end ? begin + chunk_tokens : whole.end};
}

}  // namespace fastembed::pooling::cuda
