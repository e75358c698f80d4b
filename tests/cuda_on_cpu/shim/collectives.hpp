// Barriers, shuffles and votes.
#pragma once

#include <string>
#include <type_traits>
#include <utility>

#include "machine.hpp"

namespace cuda_on_cpu {

// A typed warp operation: body(inputs, outputs, mask), on arrays of 32 pointers, run once for all lanes of the mask.
template <class Input, class Output, class Body>
Output collective(const char* name, unsigned mask, const Input& input, Site site, Body body) {
  Output output{};
  const Exchange exchange = [](const void* const* inputs, void* const* outputs, unsigned lanes, void* context) {
    const Input* in[32];
    Output* out[32];
    for (int lane = 0; lane < 32; ++lane) {
      in[lane] = static_cast<const Input*>(inputs[lane]);
      out[lane] = static_cast<Output*>(outputs[lane]);
    }
    (*static_cast<Body*>(context))(in, out, lanes);
  };
  warp_operation(name, mask, &input, &output, exchange, &body, site);
  return output;
}

// source(lane, operand) is the lane whose value a lane gets; outside its segment of `width` it keeps its own.
template <class T, class Source>
T shuffle(const char* name, unsigned mask, T value, int operand, int width, Site site, Source source) {
  return collective<std::pair<T, int>, T>(name, mask, {value, operand}, site, [=](auto* in, auto* out, unsigned lanes) {
    for (int lane = 0; lane < 32; ++lane) {
      if ((lanes >> lane & 1) == 0) continue;
      const int segment = lane & ~(width - 1);
      int from = source(lane, in[lane]->second);
      if (from < segment || from >= segment + width) from = lane;
      if (in[from] == nullptr) {
        fail(std::string(name) + " at " + describe(site) + " reads lane " + std::to_string(from) +
             ", which is not in the mask");
      }
      *out[lane] = in[from]->first;
    }
  });
}

template <class Output, class Body>
Output vote(const char* name, unsigned mask, int predicate, Site site, Body body) {
  return collective<int, Output>(name, mask, predicate, site, [=](auto* in, auto* out, unsigned lanes) {
    unsigned ballot = 0;
    for (int lane = 0; lane < 32; ++lane) ballot |= (in[lane] != nullptr && *in[lane] != 0 ? 1u : 0u) << lane;
    for (int lane = 0; lane < 32; ++lane) {
      if (out[lane] != nullptr) *out[lane] = body(ballot, lanes);
    }
  });
}

}  // namespace cuda_on_cpu

#define CUDA_ON_CPU_SITE ::cuda_on_cpu::Site site = ::cuda_on_cpu::Site::current()

inline void __syncthreads(CUDA_ON_CPU_SITE) { cuda_on_cpu::block_barrier(0, cuda_on_cpu::Vote::any, site); }
inline int __syncthreads_count(int predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::block_barrier(predicate, cuda_on_cpu::Vote::count, site);
}
inline int __syncthreads_and(int predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::block_barrier(predicate, cuda_on_cpu::Vote::all, site);
}
inline int __syncthreads_or(int predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::block_barrier(predicate, cuda_on_cpu::Vote::any, site);
}
inline void __syncwarp(unsigned mask = ~0u, CUDA_ON_CPU_SITE) { cuda_on_cpu::warp_barrier(mask, site); }

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::shuffle("__shfl_sync", mask, value, source, width, site,
                              [=](int lane, int from) { return (lane & ~(width - 1)) | (from & (width - 1)); });
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::shuffle("__shfl_xor_sync", mask, value, lanes, width, site,
                              [](int lane, int operand) { return lane ^ operand; });
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::shuffle("__shfl_down_sync", mask, value, static_cast<int>(delta), width, site,
                              [](int lane, int operand) { return lane + operand; });
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::shuffle("__shfl_up_sync", mask, value, static_cast<int>(delta), width, site,
                              [](int lane, int operand) { return lane - operand; });
}

inline unsigned __ballot_sync(unsigned mask, int predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::vote<unsigned>("__ballot_sync", mask, predicate, site,
                                     [](unsigned ballot, unsigned) { return ballot; });
}
inline int __any_sync(unsigned mask, int predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::vote<int>("__any_sync", mask, predicate, site,
                                [](unsigned ballot, unsigned) { return ballot != 0; });
}
inline int __all_sync(unsigned mask, int predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::vote<int>("__all_sync", mask, predicate, site,
                                [](unsigned ballot, unsigned lanes) { return ballot == lanes; });
}

template <class T, class Combine>
T cuda_on_cpu_reduce(const char* name, unsigned mask, T value, cuda_on_cpu::Site site, Combine combine) {
  return cuda_on_cpu::collective<T, T>(name, mask, value, site, [=](auto* in, auto* out, unsigned lanes) {
    T total = *in[__builtin_ctz(lanes)];
    for (unsigned rest = lanes & (lanes - 1); rest != 0; rest &= rest - 1) {
      total = combine(total, *in[__builtin_ctz(rest)]);
    }
    for (int lane = 0; lane < 32; ++lane) {
      if (out[lane] != nullptr) *out[lane] = total;
    }
  });
}
// The hardware's integer reductions (sm_80 and newer).
template <class T>
T __reduce_add_sync(unsigned mask, T value, CUDA_ON_CPU_SITE) {
  static_assert(std::is_integral_v<T>);
  return cuda_on_cpu_reduce("__reduce_add_sync", mask, value, site, [](T a, T b) { return a + b; });
}
template <class T>
T __reduce_min_sync(unsigned mask, T value, CUDA_ON_CPU_SITE) {
  static_assert(std::is_integral_v<T>);
  return cuda_on_cpu_reduce("__reduce_min_sync", mask, value, site, [](T a, T b) { return b < a ? b : a; });
}
template <class T>
T __reduce_max_sync(unsigned mask, T value, CUDA_ON_CPU_SITE) {
  static_assert(std::is_integral_v<T>);
  return cuda_on_cpu_reduce("__reduce_max_sync", mask, value, site, [](T a, T b) { return a < b ? b : a; });
}
