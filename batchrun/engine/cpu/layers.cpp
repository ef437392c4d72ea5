// Layers in float32, on any CPU: of activations and weights in float32, or widened to it.
//
//   A  rows    [rows][k]
//   B  panels  [n / 32][2][k][16 columns]

#include "floats.h"
#include "layers.h"

namespace {

constexpr int64_t kDepth = 512;  // of k: half a panel stays in the L1 cache; short sums round less

template <class T>
struct Floats {
  using Number = T;
  using Packed = float;

  static int64_t at(int64_t row, int64_t column, int64_t k) { return row * k + column; }

  static void widen(const void* panel, bool bytes, int64_t count, float* to) {
    for (int64_t i = 0; i < count; i += 16)
      store(bytes ? load(static_cast<const int8_t*>(panel) + i)
                  : load(static_cast<const T*>(panel) + i),
            to + i);
  }

  static void multiply(int64_t, const float* a, int64_t rows, const float* b, int64_t k, float* c,
                       Ahead ahead) {
    for (int64_t i = 0; i < k; i += kDepth) {
      const int64_t depth = std::min(k - i, kDepth);
      multiply_pair({a + i, k, rows, b + i * 16, k * 16, depth, c, 32, i > 0}, ahead);
      ahead.next += ahead.lines * depth * 2;  // 64 bytes for each of 32
    }
  }

  template <class To>
  static void put(const Sixteen& low, const Sixteen& high, To* to) {
    store(low, to);
    store(high, to + 16);
  }

  template <class To>
  static void put(const Sixteen& x, To* to) {
    store(x, to);
  }

  static Sixteen silu(const Sixteen& x) {
    const Sixteen exponent = all(0) - larger(x * all(1.44269504f), all(-126));
    return x / (all(1) + power(exponent));
  }
};

}  // namespace

#if defined(OF_FLOAT32)
LAYERS(Floats<float>, float32)
#elif defined(OF_BFLOAT16)
LAYERS(Floats<uint16_t>, bfloat16)
#elif defined(HAS_FLOAT16)
LAYERS(Floats<float16>, float16)
#endif
