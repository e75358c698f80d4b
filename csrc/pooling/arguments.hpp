// The arguments of pool_exits as Python passes them, for the CPU's and the CUDA module's bindings.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "pooling/pooling.hpp"

namespace fastembed::pooling {

using Address = uintptr_t;
// (address, sequence stride, token stride, element size, bits of one, bits of negative zero); strides in elements.
using MaskTuple = std::tuple<Address, int64_t, int64_t, int64_t, uint64_t, uint64_t>;
// (address, stride, is int64)
using OffsetsTuple = std::tuple<Address, int64_t, bool>;
// (dim, address of its output)
using PrefixTuples = std::vector<std::pair<int64_t, Address>>;
// (address, sequence stride, token stride, prefixes)
using ExitTuple = std::tuple<Address, int64_t, int64_t, PrefixTuples>;
// (address of pooled, address of winner or 0)
using StateTuple = std::tuple<Address, Address>;
// (address, size, state, gradients of the prefixes)
using ExitGradientTuple = std::tuple<Address, int64_t, StateTuple, PrefixTuples>;

inline std::vector<Prefix> to_prefixes(const PrefixTuples& tuples) {
  std::vector<Prefix> prefixes;
  prefixes.reserve(tuples.size());
  for (const auto& [dim, data] : tuples) prefixes.push_back({dim, reinterpret_cast<void*>(data)});
  return prefixes;
}

inline std::vector<Exit> to_exits(const std::vector<ExitTuple>& tuples) {
  std::vector<Exit> exits;
  exits.reserve(tuples.size());
  for (const auto& [data, sequence_stride, token_stride, prefix_tuples] : tuples) {
    exits.push_back({reinterpret_cast<const void*>(data), sequence_stride, token_stride, to_prefixes(prefix_tuples)});
  }
  return exits;
}

inline State to_state(const StateTuple& tuple) {
  const auto& [pooled, winner] = tuple;
  return {reinterpret_cast<float*>(pooled), reinterpret_cast<int32_t*>(winner)};
}

inline std::vector<State> to_states(const std::vector<StateTuple>& tuples) {
  std::vector<State> states;
  states.reserve(tuples.size());
  for (const StateTuple& tuple : tuples) states.push_back(to_state(tuple));
  return states;
}

inline std::vector<ExitGradient> to_exit_gradients(const std::vector<ExitGradientTuple>& tuples) {
  std::vector<ExitGradient> exits;
  exits.reserve(tuples.size());
  for (const auto& [data, size, state, prefixes] : tuples) {
    exits.push_back({reinterpret_cast<void*>(data), size, to_state(state), to_prefixes(prefixes)});
  }
  return exits;
}

// A Batch together with what it points to.
class OwnedBatch {
 public:
  OwnedBatch(int64_t sequences, int64_t tokens, const std::optional<MaskTuple>& mask,
             const std::optional<OffsetsTuple>& offsets)
      : batch_{sequences, tokens, nullptr, nullptr} {
    if (mask) {
      const auto& [data, sequence_stride, token_stride, element_size, one, negative_zero] = *mask;
      mask_ = {reinterpret_cast<const void*>(data), sequence_stride, token_stride, element_size, one, negative_zero};
      batch_.mask = &mask_;
    }
    if (offsets) {
      const auto& [data, stride, is_int64] = *offsets;
      offsets_ = {reinterpret_cast<const void*>(data), stride, is_int64};
      batch_.offsets = &offsets_;
    }
  }
  OwnedBatch(const OwnedBatch&) = delete;
  OwnedBatch& operator=(const OwnedBatch&) = delete;

  const Batch& get() const { return batch_; }

 private:
  Mask mask_{};
  Offsets offsets_{};
  Batch batch_;
};

}  // namespace fastembed::pooling
