// Sixteen numbers at a time, in whatever vectors the CPU has: one of AVX-512, two of AVX, four of NEON.
//
// Sums over sixteen lanes are added up in one order, and the compiler fuses the same products and
// sums everywhere: CPUs with fused multiply-add get the same bits, however wide their vectors are.

#pragma once

#include "common.h"

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int kVecs = 16 / kLanes;

typedef float Vec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));
typedef int8_t Bytes __attribute__((vector_size(kLanes), aligned(1), may_alias));

struct Sixteen {
  Vec v[kVecs];
};

namespace {

template <class F>
inline Sixteen each(F f) {
  Sixteen s;
  for (int i = 0; i < kVecs; i++) s.v[i] = f(i);
  return s;
}

inline Sixteen all(float x) {
  return each([&](int) { return x - Vec{}; });
}

inline Sixteen operator+(const Sixteen& a, const Sixteen& b) {
  return each([&](int i) { return a.v[i] + b.v[i]; });
}

inline Sixteen operator-(const Sixteen& a, const Sixteen& b) {
  return each([&](int i) { return a.v[i] - b.v[i]; });
}

inline Sixteen operator*(const Sixteen& a, const Sixteen& b) {
  return each([&](int i) { return a.v[i] * b.v[i]; });
}

inline Sixteen operator/(const Sixteen& a, const Sixteen& b) {
  return each([&](int i) { return a.v[i] / b.v[i]; });
}

// The larger number of each lane; b's where either is none.
inline Sixteen larger(const Sixteen& a, const Sixteen& b) {
  return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}

// `a` in lanes before `count`, `b` in the others.
inline Sixteen before(int64_t count, const Sixteen& a, const Sixteen& b) {
  return each([&](int i) {
    Ints lane;
    for (int j = 0; j < kLanes; j++) lane[j] = i * kLanes + j;
    return lane < Ints{} + int32_t(std::min<int64_t>(count, 16)) ? a.v[i] : b.v[i];
  });
}

// The largest number, in all lanes.
inline Sixteen largest(const Sixteen& x) {
  Vec most = x.v[0];
  for (int i = 1; i < kVecs; i++) most = most > x.v[i] ? most : x.v[i];
#pragma GCC unroll 4
  for (int half = kLanes / 2; half; half /= 2) {
    Ints other;
    for (int j = 0; j < kLanes; j++) other[j] = j ^ half;
    const Vec y = __builtin_shuffle(most, other);
    most = most > y ? most : y;
  }
  return each([&](int) { return most; });
}

inline float first(const Sixteen& x) { return x.v[0][0]; }

// --- memory ---

inline Sixteen load(const float* from) {
  return each([&](int i) { return reinterpret_cast<const Vec*>(from)[i]; });
}

inline Sixteen load(const uint16_t* from) {  // bfloat16
  return each([&](int i) {
    return (Vec)(__builtin_convertvector(reinterpret_cast<const Halves*>(from)[i], Ints) << 16);
  });
}

inline Sixteen load(const int8_t* from) {
  return each([&](int i) {
    const Ints wide = __builtin_convertvector(reinterpret_cast<const Bytes*>(from)[i], Ints);
    return __builtin_convertvector(wide, Vec);
  });
}

inline void store(const Sixteen& x, float* to) {
  for (int i = 0; i < kVecs; i++) reinterpret_cast<Vec*>(to)[i] = x.v[i];
}

inline void store(const Sixteen& x, uint16_t* to) {  // bfloat16: to the nearest, ties to even
  for (int i = 0; i < kVecs; i++) {
    const Ints bits = (Ints)x.v[i];
    const Ints rounded = bits + 0x7fff + ((bits >> 16) & 1);
    const Ints kept = x.v[i] == x.v[i] ? rounded >> 16 : Ints{} + 0x7fc0;
    reinterpret_cast<Halves*>(to)[i] = __builtin_convertvector(kept, Halves);
  }
}

// By name, C++ has these numbers only since GCC 12 on x86, and since 13 on ARM.
#ifdef __F16C__
#define HAS_FLOAT16
struct float16 {
  uint16_t bits;
};

inline float widen(float16 x) { return _cvtsh_ss(x.bits); }

inline Sixteen load(const float16* from) {
  float wide[16];
  for (int i = 0; i < 16; i += 8)
    _mm256_storeu_ps(wide + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + i))));
  return load(wide);
}

inline void store(const Sixteen& x, float16* to) {
  float wide[16];
  store(x, wide);
  for (int i = 0; i < 16; i += 8)
    _mm_storeu_si128((__m128i*)(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(wide + i), 0));
}
#elif defined(__aarch64__)
#define HAS_FLOAT16
using float16 = __fp16;

inline float widen(float16 x) { return x; }

inline Sixteen load(const float16* from) {
  return each([&](int i) { return (Vec)vcvt_f32_f16(vld1_f16(from + i * 4)); });
}

inline void store(const Sixteen& x, float16* to) {
  for (int i = 0; i < 4; i++) vst1_f16(to + i * 4, vcvt_f16_f32((float32x4_t)x.v[i]));
}
#endif

// --- functions ---

// The sum of the lanes: halves are added until one is left.
inline float sum(const Sixteen& x) {
  float lanes[16];
  store(x, lanes);
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
  return lanes[0];
}

// 2^x to a part in ten million, exactly 1 of 0; 0 below -126. x is at most 126.
inline Sixteen power(const Sixteen& x) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to whole numbers
  return each([&](int i) {
    const Vec low = -126.0f - Vec{};
    const Vec y = low > x.v[i] ? low : x.v[i];
    const Vec shifted = y + kMagic, part = y - (shifted - kMagic);
    Vec p = 1.5403530e-4f * part + 1.3333558e-3f;
    p = p * part + 9.6181291e-3f;
    p = p * part + 5.5504109e-2f;
    p = p * part + 2.4022651e-1f;
    p = p * part + 6.9314718e-1f;
    p = p * part + 1.0f;
    const Ints whole = ((Ints)shifted << 23) + 0x3f800000;
    return x.v[i] < low ? Vec{} : p * (Vec)whole;
  });
}

}  // namespace
