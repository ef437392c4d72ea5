// Decoder layers and linear layers in bfloat16 on x86 CPUs with AMX or AVX512-BF16.
//
// A matrix product is cut into blocks of 32 rows by panels of 32 columns, in the tiles of AMX:
//
//   A  rows     [rows / 16][k / 32][16 rows][32]        packed anew for each product
//   B  panels   [n / 32][k / 32][2][16 pairs][16 columns][2]   weights, packed once; 8-bit ones
//                                                             become bfloat16 a panel at a time
//   C  block    [32][32] float: what an epilogue makes the result of
//
// Each number is summed over k in one order, whatever the batch and the number of threads: a row's
// result depends on that row alone.
//
// Threads share the work as a grid, rows by panels. Few rows are one band, whose weights the threads
// divide: each byte of them is read once. Many rows are a band for each thread, which then stays in
// its core's cache from the first product of a layer to the last.

#include "common.h"

#include <omp.h>

// As in layers.py.
struct Matrix {
  const void* panels;   // bfloat16, or int8 where there are scales
  const float* scales;  // [n] or null
  const float* bias;    // [n] or null
  int64_t n, k;       // k: a multiple of 32
};

struct Linear {
  Matrix weight;
  const uint16_t* x;  // [rows, k]
  uint16_t* out;      // [rows, n]
  int64_t rows, threads, level;
};

struct Project {
  Matrix weight;         // of queries, keys and values, one behind the other
  const float* norm;     // [k]: before the product
  const float* heads_norm[2];  // [dim] of queries and of keys, or null
  int64_t heads[2];      // of queries, of keys
  int64_t dim, rotary;   // of a head; how much of it is rotated
  double eps;
  const uint16_t* x;     // [rows, k]
  const uint16_t *cos, *sin;  // [rows, rotary]
  uint16_t* out;         // [rows, n]
  int64_t rows, threads, level;
};

struct Finish {
  Matrix output, gate_up, down;  // gate_up: 16 columns of the gate, then the same 16 of up
  const float* norm;             // [output.n]
  double eps;
  const uint16_t* attended;  // [rows, output.k]
  const uint16_t* x;         // [rows, output.n]: the layer's input
  uint16_t* out;             // [rows, output.n]
  int64_t rows, threads, level;
};

FILLED_BY_PYTHON(Linear, Linear, 10)
FILLED_BY_PYTHON(Project, Project, 20)
FILLED_BY_PYTHON(Finish, Finish, 23)

namespace {

constexpr int64_t kBand = 128;               // rows worth a band of their own
constexpr int64_t kCached = 384 * 1024;      // numbers of A that a core's cache holds

int64_t tiles(int64_t rows) { return (rows + 15) / 16; }

// --- sixteen numbers at a time ---

// Weights of 8 bits: bfloat16 holds whole numbers up to 256.
inline void widen(const int8_t* from, int64_t count, uint16_t* to) {
  for (int64_t i = 0; i < count; i += 32) {
    const auto bytes = reinterpret_cast<const __m128i*>(from + i);
    const __m512i low = _mm512_cvtepi8_epi32(_mm_load_si128(bytes));
    const __m512i high = _mm512_cvtepi8_epi32(_mm_load_si128(bytes + 1));
    _mm512_store_si512(to + i, (__m512i)_mm512_cvtne2ps_pbh(_mm512_cvtepi32_ps(high),
                                                            _mm512_cvtepi32_ps(low)));
  }
}

inline void narrow(__m512 x, uint16_t* to) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(x));
}

inline void narrow(__m512 low, __m512 high, uint16_t* to) {
  _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

// x / (1 + exp(-x)), to a tenth of bfloat16's precision.
inline __m512 silu(__m512 x) {
  const __m512 power = _mm512_mul_ps(x, _mm512_set1_ps(-1.44269504f));
  const __m512 whole = _mm512_roundscale_ps(power, 0), part = _mm512_sub_ps(power, whole);
  __m512 p = _mm512_set1_ps(9.6181291e-3f);  // 2^part by its Taylor series
  for (float c : {5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f})
    p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(c));
  const __m512 sum = _mm512_add_ps(_mm512_set1_ps(1.0f), _mm512_scalef_ps(p, whole));
  return _mm512_mul_ps(x, _mm512_rcp14_ps(sum));
}

// 1 / sqrt(mean(x * x) + eps)
inline float inverse_rms(const uint16_t* x, int64_t n, double eps) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < n; i += 16) {
    const __m512 v = widen(x + i);
    sum = _mm512_fmadd_ps(v, v, sum);
  }
  return float(1.0 / __builtin_sqrt(_mm512_reduce_add_ps(sum) / double(n) + eps));
}

// Thirty-two numbers of a row, scaled and times their weights.
inline void normed(const uint16_t* x, __m512 scale, const float* weight, uint16_t* to) {
  const __m512 low = _mm512_mul_ps(widen(x), scale), high = _mm512_mul_ps(widen(x + 16), scale);
  narrow(_mm512_mul_ps(low, _mm512_loadu_ps(weight)),
         _mm512_mul_ps(high, _mm512_loadu_ps(weight + 16)), to);
}

// --- rows as tiles ---

// Rows [begin, end) to tiles, each by copy(row, to); what is beyond becomes 0.
template <class Copy>
void pack(int64_t begin, int64_t end, int64_t k, uint16_t* to, Copy copy) {
  for (int64_t row = begin; row < begin + tiles(end - begin) * 16; row++) {
    uint16_t* into = to + (row - begin) / 16 * 16 * k + (row - begin) % 16 * 32;
    if (row < end) {
      copy(row, into);
    } else {
      for (int64_t i = 0; i < k; i += 32, into += kTile)
        _mm512_store_si512(into, _mm512_setzero_si512());
    }
  }
}

void pack(const uint16_t* x, int64_t begin, int64_t end, int64_t k, uint16_t* to) {
  pack(begin, end, k, to, [&](int64_t row, uint16_t* into) {
    const uint16_t* from = x + row * k;
    for (int64_t i = 0; i < k; i += 32, into += kTile)
      _mm512_store_si512(into, _mm512_loadu_si512(from + i));
  });
}

// The same of rows divided by their root mean square, times `weight`.
void pack_normed(const uint16_t* x, const float* weight, double eps, int64_t begin, int64_t end,
                 int64_t k, uint16_t* to) {
  pack(begin, end, k, to, [&](int64_t row, uint16_t* into) {
    const uint16_t* from = x + row * k;
    const __m512 scale = _mm512_set1_ps(inverse_rms(from, k, eps));
    for (int64_t i = 0; i < k; i += 32, into += kTile) normed(from + i, scale, weight + i, into);
  });
}

// --- a block: 32 rows (or 16) by 32 columns ---

// Asks for the memory of the next panel a little at a time, while this one is computed with.
struct Ahead {
  const char* next;
  int64_t lines;  // at each step

  void step() {
    for (int64_t i = 0; i < lines; i++, next += 64) _mm_prefetch(next, _MM_HINT_T1);
  }
};

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

void multiply(int64_t level, const uint16_t* a, int64_t rows, const uint16_t* b, int64_t k,
              float* c, Ahead ahead) {
#ifdef __AMX_BF16__
  if (level == kTiles) {
    asm volatile("" ::: "memory");  // the compiler takes tile loads for no reads
    if (rows > 16) {
      multiply_amx<true>(a, b, k, c, ahead);
    } else {
      multiply_amx<false>(a, b, k, c, ahead);
    }
    return;
  }
#endif
  multiply_avx512(a, std::min<int64_t>(rows, 32), b, k, c, ahead);
}

// --- a thread's share ---

struct Share {
  int64_t begin, end;   // its band of rows
  int64_t band, bands;
  int64_t part, parts;  // of the panels
  int64_t most;         // rows of the largest band
  int64_t level;        // what is to multiply

  Share(int64_t rows, int64_t level) : level(level) {
    const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
    const int64_t all = tiles(rows);
    bands = std::clamp<int64_t>(rows / kBand, 1, threads);
    parts = threads / bands;
    band = thread % bands;
    part = thread / bands;  // threads beyond the grid have no panels
    begin = std::min(rows, all * band / bands * 16);
    end = std::min(rows, all * (band + 1) / bands * 16);
    most = (all + bands - 1) / bands * 16;
  }

  // Waits for those who compute other panels of the same rows.
  void wait() const {
    if (parts > 1) {
#pragma omp barrier
    }
  }

  // Rows of A that stay in a core's cache.
  static int64_t rows_of(int64_t k) {
    return std::max<int64_t>(32, kCached / k / 32 * 32);
  }
};

// The product of packed rows with this thread's panels of a matrix, block by block to
// epilogue(row, rows, column, block).
template <class Epilogue>
void product(const uint16_t* a, int64_t rows, const Matrix& w, const Share& share,
             Epilogue epilogue) {
  if (rows <= 0) return;  // a band may end before the largest does
  static thread_local Buffer<uint16_t> kept;
  alignas(64) float block[32 * 32];
  const int64_t panels = (w.n + 31) / 32, size = 32 * w.k, bytes = w.scales ? size : 2 * size;
  uint16_t* wide = w.scales ? kept.get(size) : nullptr;
  const int64_t first = std::min(panels, panels * share.part / share.parts);
  const int64_t last = std::min(panels, panels * (share.part + 1) / share.parts);
  const int64_t blocks = (rows + 31) / 32, all = bytes / (2 * w.k);  // lines of a panel and step
  const int64_t lines = (all + blocks - 1) / blocks;
  for (int64_t panel = first; panel < last; panel++) {
    const char* weights = static_cast<const char*>(w.panels) + panel * bytes;
    if (w.scales) widen(reinterpret_cast<const int8_t*>(weights), size, wide);
    const uint16_t* b = w.scales ? wide : reinterpret_cast<const uint16_t*>(weights);
    for (int64_t row = 0, i = 0; row < rows; row += 32, i++) {
      const char* next = weights + bytes + i * lines * 2 * w.k;
      const bool wanted = panel + 1 < last && i * lines < all;
      multiply(share.level, a + row * w.k, rows - row, b, w.k, block,
               {next, wanted ? lines : 0});
      epilogue(row, std::min<int64_t>(32, rows - row), panel * 32, block);
    }
  }
}

// Sixteen columns of a row of a block, scaled and with the bias added.
inline __m512 sixteen(const Matrix& w, const float* block, int64_t row, int64_t column, int half) {
  __m512 sum = _mm512_load_ps(block + row * 32 + half * 16);
  if (w.scales) sum = _mm512_mul_ps(sum, _mm512_loadu_ps(w.scales + column + half * 16));
  return w.bias ? _mm512_add_ps(sum, _mm512_loadu_ps(w.bias + column + half * 16)) : sum;
}

template <class Call, class Body>
void together(const Call& c, Body body) {
#pragma omp parallel num_threads(c.threads)
  {
    const Tiles tiles(c.level);
    body(Share(c.rows, c.level));
  }
}

thread_local Buffer<uint16_t> packed;

// Norms one head and rotates it (Su et al. 2021), its halves against each other.
void rotate(const Project& c, const float* norm, const uint16_t* cos, const uint16_t* sin,
            uint16_t* head) {
  const float scale = norm ? inverse_rms(head, c.dim, c.eps) : 1;
  const int64_t half = c.rotary / 2;
  auto normed = [&](int64_t i) {
    const __m512 x = widen(head + i);
    if (!norm) return x;
    return _mm512_mul_ps(_mm512_mul_ps(x, _mm512_set1_ps(scale)), _mm512_loadu_ps(norm + i));
  };
  for (int64_t i = 0; i < half; i += 16) {
    const __m512 x = normed(i), y = normed(i + half);
    const __m512 crossed = _mm512_mul_ps(y, widen(sin + i));
    narrow(_mm512_fmsub_ps(x, widen(cos + i), crossed), head + i);
    narrow(_mm512_fmadd_ps(y, widen(cos + half + i), _mm512_mul_ps(x, widen(sin + half + i))),
           head + half + i);
  }
  for (int64_t i = c.rotary; norm && i < c.dim; i += 16) narrow(normed(i), head + i);
}

}  // namespace

extern "C" void batchrun_linear(const Linear& c) {
  const Matrix& w = c.weight;
  together(c, [&](const Share& share) {
    const int64_t step = Share::rows_of(w.k);
    uint16_t* a = packed.get(step * w.k);
    for (int64_t at = share.begin; at < share.end; at += step) {
      const int64_t end = std::min(share.end, at + step);
      pack(c.x, at, end, w.k, a);
      product(a, end - at, w, share, [&](int64_t row, int64_t rows, int64_t column, float* block) {
        for (int64_t r = 0; r < rows; r++) {
          uint16_t* to = c.out + (at + row + r) * w.n + column;
          uint16_t last[32];
          const bool whole = column + 32 <= w.n;
          narrow(sixteen(w, block, r, column, 0), sixteen(w, block, r, column, 1),
                 whole ? to : last);
          if (!whole) std::copy(last, last + w.n - column, to);
        }
      });
    }
  });
}

extern "C" void batchrun_project(const Project& c) {
  const Matrix& w = c.weight;
  together(c, [&](const Share& share) {
    const int64_t step = Share::rows_of(w.k);
    uint16_t* a = packed.get(step * w.k);
    for (int64_t i = 0; i < share.most; i += step) {
      const int64_t at = std::min(share.end, share.begin + i), end = std::min(share.end, at + step);
      pack_normed(c.x, c.norm, c.eps, at, end, w.k, a);
      product(a, end - at, w, share, [&](int64_t row, int64_t rows, int64_t column, float* block) {
        for (int64_t r = 0; r < rows; r++)
          narrow(sixteen(w, block, r, column, 0), sixteen(w, block, r, column, 1),
                 c.out + (at + row + r) * w.n + column);
      });
      share.wait();
      if (share.part >= share.parts) continue;
      for (int64_t row = at + share.part; row < end; row += share.parts) {
        uint16_t* head = c.out + row * w.n;
        for (int of = 0; of < 2; of++)
          for (int64_t h = 0; h < c.heads[of]; h++, head += c.dim)
            rotate(c, c.heads_norm[of], c.cos + row * c.rotary, c.sin + row * c.rotary, head);
      }
    }
  });
}

extern "C" void batchrun_finish(const Finish& c) {
  const int64_t n = c.output.n, inner = c.down.k, widest = std::max({n, c.output.k, inner});
  const int64_t step = Share::rows_of(widest);
  static thread_local Buffer<uint16_t> middle_kept, inner_kept;
  uint16_t* middle = middle_kept.get(c.rows * n);
  uint16_t* shared = inner_kept.get(c.threads * step * inner);
  together(c, [&](const Share& share) {
    uint16_t* a = packed.get(step * widest);
    uint16_t* activated = shared + share.band * step * inner;
    for (int64_t i = 0; i < share.most; i += step) {
      const int64_t at = std::min(share.end, share.begin + i), end = std::min(share.end, at + step);
      auto add_to = [&](const Matrix& w, const uint16_t* x, uint16_t* to) {
        return [&w, x, to, at, n](int64_t row, int64_t rows, int64_t column, float* block) {
          for (int64_t r = 0; r < rows; r++) {
            const int64_t place = (at + row + r) * n + column;
            narrow(_mm512_add_ps(widen(x + place), sixteen(w, block, r, column, 0)),
                   _mm512_add_ps(widen(x + place + 16), sixteen(w, block, r, column, 1)),
                   to + place);
          }
        };
      };
      pack(c.attended, at, end, c.output.k, a);
      product(a, end - at, c.output, share, add_to(c.output, c.x, middle));
      share.wait();
      pack_normed(middle, c.norm, c.eps, at, end, n, a);
      product(a, end - at, c.gate_up, share,
              [&](int64_t row, int64_t rows, int64_t column, float* block) {
                const int64_t to = column / 2;  // 16 columns of the result
                for (int64_t r = 0; r < rows; r++)
                  narrow(_mm512_mul_ps(silu(sixteen(c.gate_up, block, r, column, 0)),
                                       sixteen(c.gate_up, block, r, column, 1)),
                         activated + (row + r) / 16 * 16 * inner + to / 32 * kTile +
                             (row + r) % 16 * 32 + to % 32);
              });
      share.wait();
      product(activated, end - at, c.down, share, add_to(c.down, middle, c.out));
      if (i + step < share.most) share.wait();
    }
  });
}

extern "C" void batchrun_rms_norm(const uint16_t* x, const float* weight, uint16_t* out, double eps,
                                  int64_t rows, int64_t n, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; row++) {
    const uint16_t* from = x + row * n;
    const __m512 scale = _mm512_set1_ps(inverse_rms(from, n, eps));
    for (int64_t i = 0; i < n; i += 32)
      normed(from + i, scale, weight + i, out + row * n + i);
  }
}
