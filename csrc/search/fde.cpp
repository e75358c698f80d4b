#include "search/fde.hpp"

#include <algorithm>
#include <cstring>
#include <vector>

#include "common/first.hpp"
#include "common/threading.hpp"
#include "search/project.hpp"

namespace fastembed::search {
namespace {

constexpr int64_t tokens_per_tile = 56;
constexpr int64_t none = -1;

// The matrices, laid out for the kernels once per call.
struct Prepared {
  const FDEMatrices& matrices;
  const ProjectKernels& kernels;
  Panels hyperplanes;
  std::vector<Panels> projections;  // one per repetition, or none at all

  explicit Prepared(const FDEMatrices& m)
      : matrices(m),
        kernels(project_kernels()),
        hyperplanes(m.hyperplanes, m.dim, m.repetitions * m.bits, m.repetitions * m.bits, 1) {
    if (m.projections == nullptr) return;
    for (int64_t r = 0; r < m.repetitions; ++r) {
      projections.emplace_back(m.projections + r * m.dim * m.projected, m.dim, m.projected, m.projected, 1);
    }
  }
};

bool is_finite(const float* values, int64_t count) {
  constexpr uint32_t exponent = 0x7f800000;
  uint32_t any = 0;
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, values + i, sizeof bits);
    any |= (bits & exponent) == exponent;
  }
  return any == 0;
}

// Encodes one sequence after another, keeping its memory.
class Encoder {
 public:
  // Returns the first token that is not finite, having written nothing, or -1.
  int64_t encode(const Prepared& prepared, const float* tokens, int64_t count, bool documents, float* out) {
    const FDEMatrices& m = prepared.matrices;
    const int64_t length = m.blocks() * m.projected;
    for (int64_t t = 0; t < count; ++t) {
      if (!is_finite(tokens + t * m.dim, m.dim)) return t;
    }
    float* encoding = out;
    if (m.buckets != nullptr) {
      encoding_.resize(static_cast<size_t>(length));
      encoding = encoding_.data();
      std::fill_n(out, m.final_dim, 0.f);
    }
    std::fill_n(encoding, length, 0.f);
    find_partitions(prepared, tokens, count);
    for (int64_t r = 0; r < m.repetitions; ++r) {
      encode_repetition(prepared, r, tokens, count, documents, encoding + (r << m.bits) * m.projected);
    }
    if (m.buckets != nullptr) {
      for (int64_t i = 0; i < length; ++i) out[m.buckets[i]] += m.signs[i] * encoding[i];
    }
    return none;
  }

 private:
  // The partition of every token in every repetition: a bit per hyperplane, set where the token lies above it.
  void find_partitions(const Prepared& prepared, const float* tokens, int64_t count) {
    const FDEMatrices& m = prepared.matrices;
    const int64_t planes = m.repetitions * m.bits;
    heights_.resize(static_cast<size_t>(tokens_per_tile * planes));
    partitions_.resize(static_cast<size_t>(count * m.repetitions));
    for (int64_t first = 0; first < count; first += tokens_per_tile) {
      const int64_t tile = std::min(tokens_per_tile, count - first);
      prepared.hyperplanes.project(prepared.kernels, tokens + first * m.dim, tile, m.dim, heights_.data(), planes);
      for (int64_t i = 0; i < tile * m.repetitions; ++i) {
        int64_t partition = 0;
        for (int bit = 0; bit < m.bits; ++bit) partition |= int64_t{heights_[i * m.bits + bit] > 0} << bit;
        partitions_[first * m.repetitions + i] = partition;
      }
    }
  }

  void encode_repetition(const Prepared& prepared, int64_t repetition, const float* tokens, int64_t count,
                         bool documents, float* blocks) {
    const FDEMatrices& m = prepared.matrices;
    add_up(prepared, repetition, tokens, count);
    const int64_t taken = static_cast<int64_t>(members_.size());
    if (documents) {
      for (int64_t slot = 0; slot < taken; ++slot) {
        const auto divisor = static_cast<float>(members_[slot].count);
        for (int64_t d = 0; d < m.dim; ++d) sums_[slot * m.dim + d] /= divisor;
      }
    }
    const float* rows = project(prepared, repetition, sums_);
    for (int64_t slot = 0; slot < taken; ++slot) {
      std::copy_n(rows + slot * m.projected, m.projected, blocks + members_[slot].partition * m.projected);
    }
    if (documents && taken > 0 && taken < int64_t{1} << m.bits) fill_empty(prepared, repetition, tokens, blocks);
  }

  // The sum of the tokens of every partition that has any, in slots by first appearance.
  void add_up(const Prepared& prepared, int64_t repetition, const float* tokens, int64_t count) {
    const FDEMatrices& m = prepared.matrices;
    slots_.assign(size_t{1} << m.bits, none);
    members_.clear();
    sums_.clear();
    for (int64_t t = 0; t < count; ++t) {
      const int64_t partition = partitions_[t * m.repetitions + repetition];
      int64_t& slot = slots_[partition];
      if (slot == none) {
        slot = static_cast<int64_t>(members_.size());
        members_.push_back({partition, t, 0});
        sums_.resize(members_.size() * m.dim, 0.f);
      }
      ++members_[slot].count;
      prepared.kernels.accumulate(sums_.data() + slot * m.dim, tokens + t * m.dim, m.dim);
    }
  }

  // Every empty block takes the token whose bits differ least from the block's, of several the first. The nearest token
  // of a partition with tokens is its own first one, so only those have to be projected.
  void fill_empty(const Prepared& prepared, int64_t repetition, const float* tokens, float* blocks) {
    const FDEMatrices& m = prepared.matrices;
    const int64_t partitions = int64_t{1} << m.bits;
    // (bits that differ, token), least first; found by letting every bit differ in turn.
    constexpr int64_t one_bit = int64_t{1} << 40;
    nearest_.assign(static_cast<size_t>(partitions), one_bit << 20);
    for (const Member& member : members_) nearest_[member.partition] = member.first_token;
    for (int64_t bit = 1; bit < partitions; bit <<= 1) {
      for (int64_t p = 0; p < partitions; ++p) {
        if ((p & bit) != 0) continue;
        int64_t &low = nearest_[p], &high = nearest_[p | bit];
        const int64_t through_low = low + one_bit;
        low = std::min(low, high + one_bit);
        high = std::min(high, through_low);
      }
    }
    firsts_.clear();
    for (const Member& member : members_) {
      const float* token = tokens + member.first_token * m.dim;
      firsts_.insert(firsts_.end(), token, token + m.dim);
    }
    const float* rows = project(prepared, repetition, firsts_);
    for (int64_t p = 0; p < partitions; ++p) {
      if (slots_[p] != none) continue;
      const int64_t token = nearest_[p] % one_bit;
      const int64_t slot = slots_[partitions_[token * m.repetitions + repetition]];
      std::copy_n(rows + slot * m.projected, m.projected, blocks + p * m.projected);
    }
  }

  // One row for each slot. Holds until the next call.
  const float* project(const Prepared& prepared, int64_t repetition, const std::vector<float>& rows) {
    if (prepared.projections.empty()) return rows.data();
    const FDEMatrices& m = prepared.matrices;
    const int64_t count = static_cast<int64_t>(members_.size());
    projected_.resize(static_cast<size_t>(count * m.projected));
    prepared.projections[repetition].project(prepared.kernels, rows.data(), count, m.dim, projected_.data(),
                                             m.projected);
    return projected_.data();
  }

  struct Member {
    int64_t partition;
    int64_t first_token;
    int64_t count;
  };

  std::vector<float> heights_, sums_, firsts_, projected_, encoding_;
  std::vector<int64_t> partitions_, slots_, nearest_;
  std::vector<Member> members_;
};

}  // namespace

int64_t fde(const float* tokens, const int64_t* offsets, int64_t sequences, const FDEMatrices& matrices, bool documents,
            float* out, int threads) {
  const Prepared prepared(matrices);
  First bad_token;
  parallel_for(sequences, threads, [&](int64_t i) {
    thread_local Encoder encoder;
    const int64_t bad = encoder.encode(prepared, tokens + offsets[i] * matrices.dim, offsets[i + 1] - offsets[i],
                                       documents, out + i * matrices.final_dim);
    if (bad != none) bad_token.offer(offsets[i] + bad);
  });
  return bad_token.index();
}

}  // namespace fastembed::search
