// What the sources have in common: what Python hands over, kept memory, bfloat16, tiles.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#ifdef __x86_64__
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

// A struct that Python fills in: it compares the size when it loads the library. Members have eight
// bytes, or four and are two, so that there are no gaps.
#define FILLED_BY_PYTHON(name, type, words)   \
  static_assert(sizeof(type) == 8 * (words)); \
  extern "C" int64_t batchrun_sizeof_##name() { return sizeof(type); }

// One call of attention, as in attention.py. Strides count numbers; the last one of each tensor is 1.
struct Call {
  const void* query;             // [tokens, q_heads, k_dim]
  const void *keys, *values;     // [slots, tokens, kv_heads, dim]
  void* out;                     // [tokens, q_heads, v_dim], dense
  const float* sinks;            // [q_heads] or null
  const int32_t *slots, *ends;   // [n]
  const int32_t* starts;         // [n + 1]: each segment's first query, which are its last tokens
  int64_t n, q_heads, kv_heads, k_dim, v_dim;
  int64_t query_stride[2], key_stride[3], value_stride[3];
  int64_t window, chunk;  // 0: none
  int64_t threads;
  int64_t level;  // as in __init__.py: what is to multiply bfloat16
  float scale, softcap;  // 0: none
  const void *new_keys, *new_values;  // [tokens, kv_heads, dim] to put in place first, or null
  int64_t new_key_stride[2], new_value_stride[2];
  int64_t n_shared;            // parts that several decodes have in common, from their first on
  const int32_t* shared_part;  // [n_shared]: which it is, of each of its members
  const int32_t *shared_starts, *shared_members;  // [n_shared + 1], [...] segments
  const int32_t* own_part;                        // [n]: the first that is not shared
};

FILLED_BY_PYTHON(Call, Call, 37)

namespace {

// Threads for so many products: those of a few microseconds take longer to share than to compute.
inline int threads_for(int64_t products, int64_t most) {
  return int(std::clamp<int64_t>(products >> 17, 1, most));
}

inline int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

// Memory that starts at a cache line and is kept from call to call.
template <class T>
class Buffer {
 public:
  ~Buffer() { std::free(memory_); }

  T* get(int64_t count) {
    if (count > count_) {
      std::free(memory_);
      count_ = round_up(std::max(count, count_ + count_ / 2), 64);  // sizes may creep up
      memory_ = static_cast<T*>(std::aligned_alloc(64, count_ * sizeof(T)));
      if (!memory_) std::abort();
    }
    return memory_;
  }

 private:
  T* memory_ = nullptr;
  int64_t count_ = 0;
};

inline float widen(float x) { return x; }

inline float widen(uint16_t x) {  // bfloat16
  const uint32_t bits = uint32_t(x) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}

#ifdef __AVX512F__
inline __m512 widen(const uint16_t* from) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

inline __m512i lanes() {
  return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}
#endif

// Asks for memory a little at a time, while something else is computed with.
struct Ahead {
  const char* next = nullptr;
  int64_t lines = 0;  // at each step

  void step() {
    for (int64_t i = 0; i < lines; i++, next += 64) __builtin_prefetch(next, 0, 2);
  }
};

// --- tiles of AMX: 16 rows of 16 pairs of bfloat16 ---

constexpr int64_t kTile = 512;  // numbers
constexpr int64_t kTiles = 2;   // the level: as in __init__.py

// While it lives, a thread can multiply tiles, if it is to.
class Tiles {
#ifdef __AMX_BF16__
 public:
  explicit Tiles(int64_t level) : used_(level == kTiles) {
    static const struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    if (used_) _tile_loadconfig(&config);
  }
  ~Tiles() {
    if (used_) _tile_release();
  }

 private:
  const bool used_;
#else
 public:
  explicit Tiles(int64_t) {}
#endif
};

}  // namespace
