// Attention in bfloat16 on CPUs that multiply it. Columns are tiles: 16 rows of 16 pairs of numbers,
// what AMX multiplies, and AVX512-BF16 row by row.

#include "attention.h"

namespace {

using Product = ProductOf<uint16_t>;

void multiply_vectors(const Product& p) {
  for (int64_t r = 0; r < p.rows; r += 4)
    for (int64_t n = 0; n < p.cols; n += 2) {
      const uint16_t *left = p.b + n * p.step, *right = left + p.step;
      const uint16_t* a = p.a + r * p.a_stride;
      __m512 sum[4][2] = {};
      for (int64_t k = 0; k < p.k / 2; k++) {
        const auto x = (__m512bh)_mm512_loadu_si512(left + k * 32);
        const auto y = (__m512bh)_mm512_loadu_si512(right + k * 32);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
          int32_t pair;
          __builtin_memcpy(&pair, a + i * p.a_stride + k * 2, 4);
          const auto q = (__m512bh)_mm512_set1_epi32(pair);
          sum[i][0] = _mm512_dpbf16_ps(sum[i][0], q, x);
          sum[i][1] = _mm512_dpbf16_ps(sum[i][1], q, y);
        }
      }
      for (int i = 0; i < 4; i++)
        for (int j = 0; j < 2; j++)
          _mm512_storeu_ps(p.c + (r + i) * p.c_stride + (n + j) * 16, sum[i][j]);
    }
}

#ifdef __AMX_BF16__
// Of 16 or 32 rows.
template <bool two>
inline void multiply_panel(const Product& p, int64_t r) {
  const uint16_t *a = p.a + r * p.a_stride, *below = a + 16 * p.a_stride;
  for (int64_t n = 0; n < p.cols; n += 2) {
    const uint16_t* b = p.b + n * p.step;
    float* c = p.c + r * p.c_stride + n * 16;
    _tile_zero(0);
    _tile_zero(1);
    if (two) _tile_zero(2);
    if (two) _tile_zero(3);
    for (int64_t k = 0; k < p.k / 32; k++) {
      _tile_loadd(4, a + k * 32, p.a_stride * 2);
      _tile_loadd(6, b + k * kTile, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, b + p.step + k * kTile, 64);
      _tile_dpbf16ps(1, 4, 7);
      if (two) {
        _tile_loadd(5, below + k * 32, p.a_stride * 2);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, c, p.c_stride * 4);
    _tile_stored(1, c + 16, p.c_stride * 4);
    if (two) _tile_stored(2, c + 16 * p.c_stride, p.c_stride * 4);
    if (two) _tile_stored(3, c + 16 * p.c_stride + 16, p.c_stride * 4);
  }
}

void multiply_tiles(const Product& p) {
  asm volatile("" ::: "memory");  // tile loads are no reads to the compiler
  for (int64_t r = 0; r < p.rows; r += 32)
    p.rows - r > 16 ? multiply_panel<true>(p, r) : multiply_panel<false>(p, r);
}

#else
void multiply_tiles(const Product& p) { multiply_vectors(p); }
#endif

// 16 tokens x 32 numbers to a tile whose columns are the tokens.
inline void pack_key(const uint16_t* from, int64_t stride, uint16_t* tile) {
  for (int quarter = 0; quarter < 4; quarter++, from += 8) {
    __m512i z[4];  // of tokens i, 4 + i, 8 + i, 12 + i
    for (int i = 0; i < 4; i++) {
      auto at = [&](int j) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + (4 * j + i) * stride));
      };
      z[i] = _mm512_castsi128_si512(at(0));
      z[i] = _mm512_mask_broadcast_i32x4(z[i], 0x00f0, at(1));
      z[i] = _mm512_mask_broadcast_i32x4(z[i], 0x0f00, at(2));
      z[i] = _mm512_mask_broadcast_i32x4(z[i], 0xf000, at(3));
    }
    const __m512i a = _mm512_unpacklo_epi32(z[0], z[1]), b = _mm512_unpacklo_epi32(z[2], z[3]);
    const __m512i c = _mm512_unpackhi_epi32(z[0], z[1]), d = _mm512_unpackhi_epi32(z[2], z[3]);
    uint16_t* to = tile + quarter * 128;
    _mm512_store_si512(to, _mm512_unpacklo_epi64(a, b));
    _mm512_store_si512(to + 32, _mm512_unpackhi_epi64(a, b));
    _mm512_store_si512(to + 64, _mm512_unpacklo_epi64(c, d));
    _mm512_store_si512(to + 96, _mm512_unpackhi_epi64(c, d));
  }
}

// 32 tokens x 16 numbers to a tile of pairs of tokens.
inline void pack_value(const uint16_t* from, int64_t stride, uint16_t* tile) {
  for (int i = 0; i < 16; i++, from += 2 * stride) {
    auto at = [&](const uint16_t* x) {
      return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
    };
    const __m512i odd = _mm512_slli_epi32(at(from + stride), 16);
    _mm512_store_si512(tile + i * 32, _mm512_or_si512(at(from), odd));
  }
}

struct Tiled {
  using Number = uint16_t;
  using Packed = uint16_t;

  static void multiply(int64_t level, const Product& p) {
    level == kTiles ? multiply_tiles(p) : multiply_vectors(p);
  }

  static void put(const uint16_t* query, uint16_t* to) { std::copy(query, query + 32, to); }

  static void pack_keys(const uint16_t* from, int64_t stride, uint16_t* tile) {
    pack_key(from, stride, tile);
  }

  static void pack_values(const uint16_t* from, int64_t stride, uint16_t* tile) {
    pack_value(from, stride, tile);
  }

  // To a part in 300,000.
  static Sixteen power(const Sixteen& exponent) {
    const auto all = [](float x) { return _mm512_set1_ps(x); };
    const auto x = (__m512)exponent.v[0];
    const __m512 r = _mm512_reduce_ps(x, 0x09);  // what is left of x above the next whole number
    __m512 p = _mm512_fmadd_ps(all(0.0134267087f), r, all(0.0522424355f));
    p = _mm512_fmadd_ps(p, r, all(0.2412802279f));
    p = _mm512_fmadd_ps(p, r, all(0.6930448413f));
    p = _mm512_fmadd_ps(p, r, all(1.0f));
    return {(Vec)_mm512_scalef_ps(p, x)};
  }

  // weights = 2^(scores * scale - top); returns lanes that sum to their total, as they are rounded.
  static Sixteen weigh(const float* scores, uint16_t* weights, int64_t from, int64_t to,
                       const Sixteen& scale, const Sixteen& top) {
    const auto ones = (__m512bh)_mm512_set1_epi32(0x3f803f80);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t t = from; t < to; t += kBlock) {
      const Sixteen x = power(load(scores + t) * scale - top);
      const Sixteen y = power(load(scores + t + 16) * scale - top);
      const __m512bh both = _mm512_cvtne2ps_pbh((__m512)y.v[0], (__m512)x.v[0]);
      _mm512_store_si512(weights + t, (__m512i)both);
      sum = _mm512_dpbf16_ps(sum, both, ones);
    }
    return {(Vec)sum};
  }

  static void store(const Sixteen& x, uint16_t* to) {
    const auto narrow = (__m256i)_mm512_cvtneps_pbh((__m512)x.v[0]);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrow);
  }
};

}  // namespace

ATTENTION(Tiled, bfloat16)
