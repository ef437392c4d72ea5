// What the sources use of AVX-512, AVX512-BF16 and AMX-BF16, on a CPU that has AVX2 and FMA alone.
//
// Included before everything else (g++ -include). A product of bfloat16 is two fused
// multiply-adds, so sums may differ from a real CPU's in their last bits.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __AVX512F__
#error "compile it with -mno-avx512f: this CPU has the real instructions"
#endif
#define __AVX512F__ 1
#define __AMX_BF16__ 1

namespace emulated {

using f32 = float __attribute__((vector_size(64), aligned(64)));
using i32 = int32_t __attribute__((vector_size(64), aligned(64)));
using u32 = uint32_t __attribute__((vector_size(64), aligned(64)));
using i64 = int64_t __attribute__((vector_size(64), aligned(64)));
using u16x16 = uint16_t __attribute__((vector_size(32), aligned(32)));
using Mask = uint16_t;

template <class To, class From>
inline To as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class V>
inline V load(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <class V>
inline void store(void* to, const V& v) {
  std::memcpy(to, &v, sizeof v);
}

template <class Body>
inline f32 each(Body body) {
  f32 v;
  for (int i = 0; i < 16; i++) v[i] = body(i);
  return v;
}

inline f32 set1(float x) { return each([&](int) { return x; }); }
inline f32 fmadd(f32 a, f32 b, f32 c) {
  const auto half = [&](int i) {
    return _mm256_fmadd_ps(_mm256_load_ps((float*)&a + i), _mm256_load_ps((float*)&b + i),
                           _mm256_load_ps((float*)&c + i));
  };
  f32 v;
  _mm256_store_ps((float*)&v, half(0));
  _mm256_store_ps((float*)&v + 8, half(8));
  return v;
}

inline uint16_t rounded(float x) {  // to the nearest bfloat16, ties to even
  uint32_t bits = as<uint32_t>(x);
  if (x != x) return uint16_t(bits >> 16 | 0x40);
  if ((bits & 0x7f800000) == 0) return uint16_t((bits & 0x80000000) >> 16);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline u16x16 cvtneps(f32 x) {
  u16x16 v;
  for (int i = 0; i < 16; i++) v[i] = rounded(x[i]);
  return v;
}

inline i32 cvtne2ps(f32 high, f32 low) {
  uint16_t v[32];
  for (int i = 0; i < 16; i++) v[i] = rounded(low[i]), v[i + 16] = rounded(high[i]);
  return load<i32>(v);
}

inline f32 odd(i32 x) { return as<f32>(as<u32>(x) & 0xffff0000u); }
inline f32 even(i32 x) { return as<f32>(as<u32>(x) << 16); }
inline f32 dpbf16(f32 sum, i32 a, i32 b) {
  return fmadd(even(a), even(b), fmadd(odd(a), odd(b), sum));
}

template <class Compare>
inline Mask mask(Compare compare) {
  Mask m = 0;
  for (int i = 0; i < 16; i++) m |= Mask(bool(compare(i))) << i;
  return m;
}

template <int kind>
inline Mask compared(f32 a, f32 b) {
  return mask([&](int i) {
    switch (kind) {
      case _CMP_GE_OQ: return a[i] >= b[i];
      case _CMP_GT_OQ: return a[i] > b[i];
      case _CMP_LT_OQ: return a[i] < b[i];
      case _CMP_EQ_OQ: return a[i] == b[i];
      case _CMP_UNORD_Q: return a[i] != a[i] || b[i] != b[i];
    }
    __builtin_trap();
  });
}

template <class V>
inline V blended(V from, Mask m, V other) {
  for (int i = 0; i < 16; i++)
    if (m >> i & 1) from[i] = other[i];
  return from;
}

inline f32 compressed(Mask m, f32 x) {
  f32 v = {};
  for (int i = 0, to = 0; i < 16; i++)
    if (m >> i & 1) v[to++] = x[i];
  return v;
}

inline i32 masked_load(uint32_t m, const uint16_t* from) {
  uint16_t v[32] = {};
  for (int i = 0; i < 32; i++)
    if (m >> i & 1) v[i] = from[i];
  return load<i32>(v);
}

inline void masked_store(uint16_t* to, Mask m, u16x16 v) {
  for (int i = 0; i < 16; i++)
    if (m >> i & 1) to[i] = v[i];
}

// Within each 128 bits: from the low or the high half of both, in turns.
template <class V, int first>
inline V unpacked(V a, V b) {
  constexpr int lane = 16 / sizeof(a[0]);
  V v;
  for (int at = 0; at < 4 * lane; at += lane)
    for (int i = 0; i < lane / 2; i++) {
      v[at + 2 * i] = a[at + first * lane / 2 + i];
      v[at + 2 * i + 1] = b[at + first * lane / 2 + i];
    }
  return v;
}

inline f32 shuffled(f32 a, f32 b, int by) {
  return each([&](int i) { return (i < 8 ? a : b)[(by >> i / 4 * 2 & 3) * 4 + i % 4]; });
}
inline f32 permuted(f32 a, int by) {
  return each([&](int i) { return a[i / 4 * 4 + (by >> i % 4 * 2 & 3)]; });
}
inline i32 broadcast4(i32 from, Mask m, __m128i x) {
  int32_t four[4];
  store(four, x);
  for (int i = 0; i < 16; i++)
    if (m >> i & 1) from[i] = four[i % 4];
  return from;
}

template <class Number, class V>
inline i32 widened(const V& x) {
  Number numbers[16];
  static_assert(sizeof numbers == sizeof x);
  store(numbers, x);
  i32 v;
  for (int i = 0; i < 16; i++) v[i] = numbers[i];
  return v;
}

inline f32 floats(i32 x) {
  return each([&](int i) { return float(x[i]); });
}

// What AVX-512 adds up: halves first.
inline float sum_of(f32 x) {
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; i++) x[i] += x[i + half];
  return x[0];
}

inline f32 scaled(f32 x, f32 power) {
  return each([&](int i) {
    const float p = std::floor(power[i]);
    return std::isfinite(p) ? std::ldexp(x[i], int(std::clamp(p, -400.f, 400.f)))
                            : p > 0 ? x[i] * p : p < 0 ? x[i] * 0 : p;
  });
}

template <int by>
inline f32 whole(f32 x) {
  static_assert(by == 0);  // to the nearest whole number
  return each([&](int i) { return std::nearbyint(x[i]); });
}

template <int by>
inline f32 left(f32 x) {
  static_assert(by == 9);  // above the whole number below
  return each([&](int i) { return std::isinf(x[i]) ? 0 : x[i] - std::floor(x[i]); });
}

// The second where either is not a number.
inline f32 larger(f32 a, f32 b) { return a > b ? a : b; }
inline f32 smaller(f32 a, f32 b) { return a < b ? a : b; }

inline float largest(f32 x) {
  float most = x[0];
  for (int i = 1; i < 16; i++) most = std::max(most, x[i]);
  return most;
}

inline int32_t smallest(Mask m, i32 x) {
  int32_t least = INT32_MAX;
  for (int i = 0; i < 16; i++)
    if (m >> i & 1) least = std::min(least, int32_t(x[i]));
  return least;
}

// --- tiles: 16 rows of 64 bytes ---

struct Tiles {
  i32 rows[8][16];
  bool configured = false;
};
inline thread_local Tiles tiles;

inline i32 (&tile(int i))[16] {
  if (!tiles.configured) __builtin_trap();  // as a CPU does
  return tiles.rows[i];
}

inline void load_config(const void* config) {
  for (int i = 0; i < 8; i++) {
    uint16_t bytes;
    std::memcpy(&bytes, static_cast<const char*>(config) + 16 + 2 * i, 2);
    if (bytes != 64 || static_cast<const uint8_t*>(config)[48 + i] != 16) __builtin_trap();
  }
  tiles.configured = true;
}

inline void load_tile(int to, const void* from, int64_t stride) {
  for (int r = 0; r < 16; r++)
    tile(to)[r] = load<i32>(static_cast<const char*>(from) + r * stride);
}

inline void store_tile(int from, void* to, int64_t stride) {
  for (int r = 0; r < 16; r++) store(static_cast<char*>(to) + r * stride, tile(from)[r]);
}

inline void multiply_tiles(int sum, int a, int b) {
  for (int r = 0; r < 16; r++) {
    f32 row = as<f32>(tile(sum)[r]);
    for (int k = 0; k < 16; k++) row = dpbf16(row, i32{} + tile(a)[r][k], tile(b)[k]);
    tile(sum)[r] = as<i32>(row);
  }
}

}  // namespace emulated

// The names that the sources know. Operators compute on the compiler's own types.
#define _mm512_set1_ps(x) ((__m512)emulated::set1(x))
#define _mm512_setzero_ps() (__m512{})
#define _mm512_setzero_si512() (__m512i{})
#define _mm512_set1_epi32(x) ((__m512i)(emulated::i32{} + int32_t(x)))
#undef _mm512_setr_epi32
#define _mm512_setr_epi32(...) ((__m512i)emulated::i32{__VA_ARGS__})
#define _mm512_load_ps(p) emulated::load<__m512>(p)
#define _mm512_loadu_ps(p) emulated::load<__m512>(p)
#define _mm512_load_si512(p) emulated::load<__m512i>(p)
#define _mm512_loadu_si512(p) emulated::load<__m512i>(p)
#define _mm512_store_ps(p, x) emulated::store<__m512>(p, x)
#define _mm512_storeu_ps(p, x) emulated::store<__m512>(p, x)
#define _mm512_store_si512(p, x) emulated::store<__m512i>(p, x)
#define _mm512_storeu_si512(p, x) emulated::store<__m512i>(p, x)
#define _mm512_add_ps(a, b) ((__m512)((a) + (b)))
#define _mm512_sub_ps(a, b) ((__m512)((a) - (b)))
#define _mm512_mul_ps(a, b) ((__m512)((a) * (b)))
#define _mm512_div_ps(a, b) ((__m512)((a) / (b)))
#define _mm512_max_ps(a, b) emulated::larger(a, b)
#define _mm512_min_ps(a, b) emulated::smaller(a, b)
#define _mm512_fmadd_ps(a, b, c) ((__m512)emulated::fmadd(a, b, c))
#define _mm512_fmsub_ps(a, b, c) ((__m512)emulated::fmadd(a, b, -(c)))
#define _mm512_rcp14_ps(x) _mm512_div_ps(_mm512_set1_ps(1), x)
#define _mm512_roundscale_ps(x, by) ((__m512)emulated::whole<by>(x))
#define _mm512_reduce_ps(x, by) ((__m512)emulated::left<by>(x))
#define _mm512_scalef_ps(x, p) ((__m512)emulated::scaled(x, p))
#define _mm512_reduce_add_ps(x) emulated::sum_of(x)
#define _mm512_reduce_max_ps(x) emulated::largest(x)
#define _mm512_mask_reduce_min_epi32(m, x) emulated::smallest(m, (emulated::i32)(x))
#define _mm512_cvtss_f32(x) ((x)[0])
#define _mm512_cvtepi32_ps(x) ((__m512)emulated::floats((emulated::i32)(x)))
#define _mm512_cvtepi8_epi32(x) ((__m512i)emulated::widened<int8_t>(x))
#define _mm512_cvtepu16_epi32(x) ((__m512i)emulated::widened<uint16_t>(x))
#define _mm512_cvtneps_pbh(x) ((__m256bh)emulated::cvtneps(x))
#define _mm512_cvtne2ps_pbh(a, b) ((__m512bh)emulated::cvtne2ps(a, b))
#define _mm512_dpbf16_ps(s, a, b) \
  ((__m512)emulated::dpbf16(s, (emulated::i32)(a), (emulated::i32)(b)))
#define _mm512_slli_epi32(x, by) ((__m512i)((emulated::u32)(x) << (by)))
#define _mm512_or_si512(a, b) ((__m512i)((a) | (b)))
#define _mm512_add_epi32(a, b) ((__m512i)((emulated::i32)(a) + (emulated::i32)(b)))
#define _mm512_castsi512_ps(x) ((__m512)(x))
#define _mm512_castsi128_si512(x) \
  ((__m512i)emulated::broadcast4(emulated::i32{}, 0x000f, x))
#define _mm512_mask_broadcast_i32x4(v, m, x) \
  ((__m512i)emulated::broadcast4((emulated::i32)(v), m, x))
#define _mm512_unpacklo_epi32(a, b) \
  ((__m512i)emulated::unpacked<emulated::i32, 0>((emulated::i32)(a), (emulated::i32)(b)))
#define _mm512_unpackhi_epi32(a, b) \
  ((__m512i)emulated::unpacked<emulated::i32, 1>((emulated::i32)(a), (emulated::i32)(b)))
#define _mm512_unpacklo_epi64(a, b) \
  ((__m512i)emulated::unpacked<emulated::i64, 0>((emulated::i64)(a), (emulated::i64)(b)))
#define _mm512_unpackhi_epi64(a, b) \
  ((__m512i)emulated::unpacked<emulated::i64, 1>((emulated::i64)(a), (emulated::i64)(b)))
#define _mm512_shuffle_f32x4(a, b, by) ((__m512)emulated::shuffled(a, b, by))
#define _mm512_permute_ps(a, by) ((__m512)emulated::permuted(a, by))
#define _mm512_cmp_ps_mask(a, b, kind) emulated::compared<kind>(a, b)
#define _mm512_mask_cmp_ps_mask(m, a, b, kind) \
  emulated::Mask((m) & emulated::compared<kind>(a, b))
#define _mm512_cmplt_epi32_mask(a, b) \
  emulated::mask([&](int i) { return ((emulated::i32)(a))[i] < ((emulated::i32)(b))[i]; })
#define _mm512_cmpge_epi32_mask(a, b) \
  emulated::mask([&](int i) { return ((emulated::i32)(a))[i] >= ((emulated::i32)(b))[i]; })
#define _mm512_mask_mov_ps(v, m, x) ((__m512)emulated::blended<emulated::f32>(v, m, x))
#define _mm512_mask_mov_epi32(v, m, x) \
  ((__m512i)emulated::blended((emulated::i32)(v), m, (emulated::i32)(x)))
#define _mm512_maskz_compress_ps(m, x) ((__m512)emulated::compressed(m, x))
#define _mm512_maskz_loadu_epi16(m, p) ((__m512i)emulated::masked_load(m, p))
#undef _mm256_mask_storeu_epi16
#define _mm256_mask_storeu_epi16(p, m, x) emulated::masked_store(p, m, (emulated::u16x16)(x))
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) emulated::load_config(config)
#define _tile_release() (emulated::tiles.configured = false)
#define _tile_zero(t) std::fill_n(emulated::tile(t), 16, emulated::i32{})
#define _tile_loadd(t, from, stride) emulated::load_tile(t, from, stride)
#define _tile_stored(t, to, stride) emulated::store_tile(t, to, stride)
#define _tile_dpbf16ps(sum, a, b) emulated::multiply_tiles(sum, a, b)
