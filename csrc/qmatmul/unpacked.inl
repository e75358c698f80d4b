// A panel unpacked into scratch memory. A file *_<level>.cpp includes this inside its own anonymous namespace.

struct Unpacked {
  uint8_t* bytes;  // [quads, 64 output features, 4 input features]
  float* scales;   // [groups, 64]
  // Where the panel and the level need them.
  int32_t* zeros;  // [groups, 64]
  float* shifts;   // [groups, 64]

  inline __attribute__((always_inline)) Unpacked(const Panel& panel, void* scratch) {
    const int64_t count = panel.groups * panel_width;
    bytes = static_cast<uint8_t*>(scratch);
    scales = reinterpret_cast<float*>(bytes + panel.quads * quad * panel_width);
    zeros = reinterpret_cast<int32_t*>(scales + count);
    shifts = reinterpret_cast<float*>(zeros + count);
  }
};

int64_t scratch_bytes(const Panel& panel, int64_t) {
  return (panel.quads * quad + panel.groups * static_cast<int64_t>(2 * sizeof(float) + sizeof(int32_t))) * panel_width;
}
