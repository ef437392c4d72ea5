// Layers in bfloat16 on x86 CPUs with AMX or AVX512-BF16, which share one order in memory: AMX's.
//
//   A  rows    [rows / 16][k / 32][16 rows][32]
//   B  panels  [n / 32][k / 32][2][16 pairs][16 columns][2]

#include "layers.h"

namespace {

#ifdef __AMX_BF16__
template <bool both>
void multiply_amx(const uint16_t* a, const uint16_t* b, int64_t k, float* c, Ahead ahead) {
  const uint16_t* lower = a + k * 16;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t i = 0; i < k * 16; i += kTile) {
    _tile_loadd(4, a + i, 64);
    _tile_loadd(6, b + 2 * i, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + 2 * i + kTile, 64);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (both) {
      _tile_loadd(5, lower + i, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    ahead.step();
  }
  _tile_stored(0, c, 128);
  _tile_stored(1, c + 16, 128);
  if constexpr (both) {
    _tile_stored(2, c + 512, 128);
    _tile_stored(3, c + 528, 128);
  }
}
#endif

// So many rows that lie in one tile.
template <int count>
void multiply_avx512(const uint16_t* a, const uint16_t* b, int64_t k, float* c, Ahead ahead) {
  __m512 sum[count][2] = {};
  for (int64_t i = 0; i < k * 16; i += kTile) {
    for (int64_t pair = 0; pair < 16; pair++) {
      const auto left = (__m512bh)_mm512_load_si512(b + 2 * i + pair * 32);
      const auto right = (__m512bh)_mm512_load_si512(b + 2 * i + kTile + pair * 32);
#pragma GCC unroll 8
      for (int r = 0; r < count; r++) {
        int32_t two;
        __builtin_memcpy(&two, a + i + r * 32 + pair * 2, 4);
        const auto spread = (__m512bh)_mm512_set1_epi32(two);
        sum[r][0] = _mm512_dpbf16_ps(sum[r][0], spread, left);
        sum[r][1] = _mm512_dpbf16_ps(sum[r][1], spread, right);
      }
    }
    ahead.step();
  }
  for (int r = 0; r < count; r++) {
    _mm512_store_ps(c + r * 32, sum[r][0]);
    _mm512_store_ps(c + r * 32 + 16, sum[r][1]);
  }
}

void multiply_avx512(const uint16_t* a, int64_t rows, const uint16_t* b, int64_t k, float* c,
                     Ahead ahead) {
  for (int64_t row = 0, count; row < rows; row += count, ahead.lines = 0) {
    const uint16_t* from = a + row / 16 * 16 * k + row % 16 * 32;
    float* to = c + row * 32;
    if (rows - row >= 8) {
      multiply_avx512<8>(from, b, k, to, ahead), count = 8;
    } else if (rows - row >= 4) {
      multiply_avx512<4>(from, b, k, to, ahead), count = 4;
    } else {
      multiply_avx512<1>(from, b, k, to, ahead), count = 1;
    }
  }
}

struct Tiled {
  using Number = uint16_t;
  using Packed = uint16_t;

  static int64_t at(int64_t row, int64_t column, int64_t k) {
    return row / 16 * 16 * k + column / 32 * kTile + row % 16 * 32;
  }

  // Weights of 8 bits: bfloat16 holds whole numbers up to 256.
  static void widen(const void* panel, bool, int64_t count, uint16_t* to) {
    const auto* from = static_cast<const int8_t*>(panel);
    for (int64_t i = 0; i < count; i += 32) put(load(from + i), load(from + i + 16), to + i);
  }

  static void multiply(int64_t level, const uint16_t* a, int64_t rows, const uint16_t* b, int64_t k,
                       float* c, Ahead ahead) {
#ifdef __AMX_BF16__
    if (level == kTiles) {
      asm volatile("" ::: "memory");  // the compiler takes tile loads for no reads
      rows > 16 ? multiply_amx<true>(a, b, k, c, ahead) : multiply_amx<false>(a, b, k, c, ahead);
      return;
    }
#endif
    multiply_avx512(a, rows, b, k, c, ahead);
  }

  static void put(const Sixteen& low, const Sixteen& high, uint16_t* to) {
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh((__m512)high.v[0], (__m512)low.v[0]));
  }

  static void put(const Sixteen& x, uint16_t* to) {
    const auto narrow = (__m256i)_mm512_cvtneps_pbh((__m512)x.v[0]);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrow);
  }

  // To a tenth of bfloat16's precision.
  static Sixteen silu(const Sixteen& x) {
    const __m512 power = _mm512_mul_ps((__m512)x.v[0], _mm512_set1_ps(-1.44269504f));
    const __m512 whole = _mm512_roundscale_ps(power, 0), part = _mm512_sub_ps(power, whole);
    __m512 p = _mm512_set1_ps(9.6181291e-3f);  // 2^part by its Taylor series
    for (float c : {5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f})
      p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(c));
    const __m512 sum = _mm512_add_ps(_mm512_set1_ps(1.0f), _mm512_scalef_ps(p, whole));
    return {(Vec)_mm512_mul_ps((__m512)x.v[0], _mm512_rcp14_ps(sum))};
  }
};

}  // namespace

LAYERS(Tiled, bfloat16)
