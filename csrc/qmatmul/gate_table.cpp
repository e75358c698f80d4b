#include "qmatmul/gate_table.hpp"

#include <array>
#include <cmath>

namespace fastembed::qmatmul {
namespace {

using Table = std::array<float, gate_coefficients * gate_segments>;
using Gate = double (*)(double);

constexpr double pi = 3.14159265358979323846;

double erf_gate(double t) { return t * 0.5 * std::erfc(t / std::sqrt(2.0)); }

double tanh_gate(double t) { return t / (1 + std::exp(2 * std::sqrt(2 / pi) * (t + 0.044715 * t * t * t))); }

// Polynomial through the gate at the Chebyshev nodes of a segment: divided differences, then to powers.
void fit_segment(Gate gate, int segment, Table& table) {
  constexpr int n = gate_coefficients;
  double node[n], difference[n];
  for (int i = 0; i < n; ++i) {
    node[i] = 0.5 - 0.5 * std::cos(pi * (i + 0.5) / n);
    difference[i] = gate((segment + node[i]) / gate_segments_per_unit);
  }
  for (int order = 1; order < n; ++order) {
    for (int i = n - 1; i >= order; --i) {
      difference[i] = (difference[i] - difference[i - 1]) / (node[i] - node[i - order]);
    }
  }
  double power[n] = {difference[n - 1]};
  for (int i = n - 2; i >= 0; --i) {
    for (int k = n - 1; k > 0; --k) power[k] = power[k - 1] - node[i] * power[k];
    power[0] = difference[i] - node[i] * power[0];
  }
  for (int k = 0; k < n; ++k) table[k * gate_segments + segment] = static_cast<float>(power[k]);
}

Table fit(Gate gate) {
  Table table{};
  for (int segment = 0; segment + 1 < gate_segments; ++segment) fit_segment(gate, segment, table);
  return table;
}

}  // namespace

const float* gate_table(Epilogue epilogue) {
  alignas(64) static const Table erf_table = fit(erf_gate);
  alignas(64) static const Table tanh_table = fit(tanh_gate);
  if (epilogue == Epilogue::gelu) return erf_table.data();
  if (epilogue == Epilogue::gelu_tanh) return tanh_table.data();
  return nullptr;
}

}  // namespace fastembed::qmatmul
