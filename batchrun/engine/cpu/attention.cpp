// Attention in float32, on any CPU: of keys and values in float32, or widened to it.

#include "attention.h"
#include "floats.h"

namespace {

typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));

inline Four four(const float* from) { return *reinterpret_cast<const Four*>(from); }

template <class T>
inline Four four(const T* from) {
  Four x;
  for (int i = 0; i < 4; i++) x[i] = widen(from[i]);
  return x;
}

// 4 x 4 numbers to their transpose, whose rows are 16 apart.
inline void transpose(const Four (&x)[4], float* to) {
  typedef int32_t At __attribute__((vector_size(16)));
  const At even = {0, 4, 1, 5}, odd = {2, 6, 3, 7}, low = {0, 1, 4, 5}, high = {2, 3, 6, 7};
  const Four a = __builtin_shuffle(x[0], x[1], even), b = __builtin_shuffle(x[2], x[3], even);
  const Four c = __builtin_shuffle(x[0], x[1], odd), d = __builtin_shuffle(x[2], x[3], odd);
  auto row = [&](int i) -> Four& { return *reinterpret_cast<Four*>(to + i * 16); };
  row(0) = __builtin_shuffle(a, b, low), row(1) = __builtin_shuffle(a, b, high);
  row(2) = __builtin_shuffle(c, d, low), row(3) = __builtin_shuffle(c, d, high);
}

template <class T>
struct Floats {
  using Number = T;
  using Packed = float;

  static void multiply(int64_t, const ProductOf<float>& p) {
    for (int64_t n = 0; n < p.cols; n += 2)
      multiply_pair({p.a, p.a_stride, p.rows, p.b + n * p.step, p.step, p.k, p.c + n * 16,
                     p.c_stride, false});
  }

  static void put(const T* query, float* to) {
    ::store(load(query), to);
    ::store(load(query + 16), to + 16);
  }

  static void pack_keys(const T* from, int64_t stride, float* to) {
    for (int token = 0; token < 16; token += 4, from += 4 * stride, to += 4)
      for (int d = 0; d < 32; d += 4)
        transpose({four(from + d), four(from + stride + d), four(from + 2 * stride + d),
                   four(from + 3 * stride + d)},
                  to + d * 16);
  }

  static void pack_values(const T* from, int64_t stride, float* to) {
    for (int token = 0; token < 32; token++) ::store(load(from + token * stride), to + token * 16);
  }

  static Sixteen power(const Sixteen& x) { return ::power(x); }

  // weights = 2^(scores * scale - top); returns lanes that sum to their total.
  static Sixteen weigh(const float* scores, float* weights, int64_t from, int64_t to,
                       const Sixteen& scale, const Sixteen& top) {
    Sixteen sum = all(0);
    for (int64_t t = from; t < to; t += 16) {
      const Sixteen weight = power(load(scores + t) * scale - top);
      ::store(weight, weights + t);
      sum = sum + weight;
    }
    return sum;
  }

  static void store(const Sixteen& x, T* to) { ::store(x, to); }
};

}  // namespace

#if defined(OF_FLOAT32)
ATTENTION(Floats<float>, float32)
#elif defined(OF_BFLOAT16)
ATTENTION(Floats<uint16_t>, bfloat16)
#elif defined(HAS_FLOAT16)
ATTENTION(Floats<float16>, float16)
#endif
