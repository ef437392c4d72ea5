// Decoder layers and linear layers, for every kind of arithmetic: layers.cpp and layers_bf16.cpp.
//
// A matrix product is cut into blocks of 32 rows by panels of 32 columns:
//
//   A  rows     packed anew for each product, in the arithmetic's order
//   B  panels   weights, packed once; those narrower than the arithmetic are widened a panel at a
//               time
//   C  block    [32][32] float: what an epilogue makes the result of
//
// Each number is summed over k in one order, whatever the batch and the number of threads: a row's
// result depends on that row alone.
//
// Threads share the work as a grid, rows by panels. Few rows are one band, whose weights the threads
// divide: each byte of them is read once. Many rows are a band for each thread, which then stays in
// its core's cache from the first product of a layer to the last.

#pragma once

#include "vectors.h"

#include <omp.h>

// As in layers.py.
struct Matrix {
  const void* panels;   // int8 where there are scales
  const float* scales;  // [n] or null
  const float* bias;    // [n] or null
  int64_t n, k;         // k: a multiple of 32
};

struct Linear {
  Matrix weight;
  const void* x;  // [rows, k]
  void* out;      // [rows, n]
  int64_t rows, threads, level;
};

struct Project {
  Matrix weight;               // of queries, keys and values, one behind the other
  const float* norm;           // [k]: before the product
  const float* heads_norm[2];  // [dim] of queries and of keys, or null
  int64_t heads[2];            // of queries, of keys
  int64_t dim, rotary;         // of a head; how much of it is rotated
  double eps;
  const void* x;            // [rows, k]
  const void *cos, *sin;    // [rows, rotary]
  void* out;                // [rows, n]
  int64_t rows, threads, level;
};

struct Finish {
  Matrix output, gate_up, down;  // gate_up: 16 columns of the gate, then the same 16 of up
  const float* norm;             // [output.n]
  double eps;
  const void* attended;  // [rows, output.k]
  const void* x;         // [rows, output.n]: the layer's input
  void* out;             // [rows, output.n]
  int64_t rows, threads, level;
};

struct Norm {
  const float* weight;  // [n]
  double eps;
  const void* x;  // [rows, n]
  void* out;
  int64_t n, rows, threads;
};

FILLED_BY_PYTHON(Linear, Linear, 10)
FILLED_BY_PYTHON(Project, Project, 20)
FILLED_BY_PYTHON(Finish, Finish, 23)
FILLED_BY_PYTHON(Norm, Norm, 7)

namespace {

constexpr int64_t kBand = 128;             // rows worth a band of their own
constexpr int64_t kCached = 768 * 1024;    // bytes of A that a core's cache holds

// --- an arithmetic ---
//
// struct K {
//   using Number;  // of activations in memory
//   using Packed;  // of A and of wide panels
//   static int64_t at(int64_t row, int64_t column, int64_t k);  // of 32 numbers of A, columns 32 * i
//   static void widen(const void* panel, bool bytes, int64_t count, Packed* to);
//   static void multiply(int64_t level, const Packed* a, int64_t rows, const Packed* b, int64_t k,
//                        float* c, Ahead ahead);
//   static void put(Sixteen low, Sixteen high, To* to);  // to A or to memory
//   static void put(Sixteen x, To* to);
//   static Sixteen silu(Sixteen x);
// };

// 1 / sqrt(mean(x * x) + eps)
template <class T>
inline float inverse_rms(const T* x, int64_t n, double eps) {
  Sixteen squares = all(0);
  for (int64_t i = 0; i < n; i += 16) {
    const Sixteen v = load(x + i);
    squares = squares + v * v;
  }
  return float(1.0 / __builtin_sqrt(sum(squares) / double(n) + eps));
}

// --- rows as A ---

// Rows [begin, end), and rows of 0 to fill the last tile: copy(row, column, to) 32 numbers.
template <class K, class Copy>
void pack(int64_t begin, int64_t end, int64_t k, typename K::Packed* to, Copy copy) {
  for (int64_t row = begin; row < round_up(end - begin, 16) + begin; row++)
    for (int64_t i = 0; i < k; i += 32) {
      auto* into = to + K::at(row - begin, i, k);
      row < end ? copy(row, i, into) : K::put(all(0), all(0), into);
    }
}

template <class K>
void pack(const void* x, int64_t begin, int64_t end, int64_t k, typename K::Packed* to) {
  const auto* from = static_cast<const typename K::Number*>(x);
  pack<K>(begin, end, k, to, [&](int64_t row, int64_t i, typename K::Packed* into) {
    K::put(load(from + row * k + i), load(from + row * k + i + 16), into);
  });
}

// Thirty-two numbers of a row, scaled and times their weights.
template <class K, class To>
inline void put_normed(const typename K::Number* x, const Sixteen& scale, const float* weight,
                       To* to) {
  K::put(load(x) * scale * load(weight), load(x + 16) * scale * load(weight + 16), to);
}

// The same of rows divided by their root mean square, times `weight`.
template <class K>
void pack_normed(const void* x, const float* weight, double eps, int64_t begin, int64_t end,
                 int64_t k, typename K::Packed* to) {
  const auto* from = static_cast<const typename K::Number*>(x);
  Sixteen scale = all(0);
  pack<K>(begin, end, k, to, [&](int64_t row, int64_t i, typename K::Packed* into) {
    if (i == 0) scale = all(inverse_rms(from + row * k, k, eps));
    put_normed<K>(from + row * k + i, scale, weight + i, into);
  });
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
    const int64_t tiles = (rows + 15) / 16;
    bands = std::clamp<int64_t>(rows / kBand, 1, threads);
    parts = threads / bands;
    band = thread % bands;
    part = thread / bands;  // threads beyond the grid have no panels
    begin = std::min(rows, tiles * band / bands * 16);
    end = std::min(rows, tiles * (band + 1) / bands * 16);
    most = (tiles + bands - 1) / bands * 16;
  }

  // Waits for those who compute other panels of the same rows.
  void wait() const {
    if (parts > 1) {
#pragma omp barrier
    }
  }

  // Rows of A that stay in a core's cache.
  template <class Packed>
  static int64_t rows_of(int64_t k) {
    return std::max<int64_t>(32, kCached / sizeof(Packed) / k / 32 * 32);
  }
};

// The product of packed rows with this thread's panels of a matrix, block by block to
// epilogue(row, rows, column, block).
template <class K, class Epilogue>
void product(const typename K::Packed* a, int64_t rows, const Matrix& w, const Share& share,
             Epilogue epilogue) {
  using Packed = typename K::Packed;
  if (rows <= 0) return;  // a band may end before the largest does
  static thread_local Buffer<Packed> kept;
  alignas(64) float block[32 * 32];
  const bool widens = w.scales || sizeof(typename K::Number) < sizeof(Packed);
  const int64_t panels = (w.n + 31) / 32, size = 32 * w.k;
  const int64_t bytes = w.scales ? size : size * int64_t(sizeof(typename K::Number));
  Packed* wide = widens ? kept.get(size) : nullptr;
  const int64_t first = std::min(panels, panels * share.part / share.parts);
  const int64_t last = std::min(panels, panels * (share.part + 1) / share.parts);
  const int64_t blocks = (rows + 31) / 32, all = bytes / (2 * w.k);  // lines of a panel and step
  const int64_t lines = (all + blocks - 1) / blocks;
  for (int64_t panel = first; panel < last; panel++) {
    const char* weights = static_cast<const char*>(w.panels) + panel * bytes;
    if (widens) K::widen(weights, w.scales, size, wide);
    const Packed* b = widens ? wide : reinterpret_cast<const Packed*>(weights);
    for (int64_t row = 0, i = 0; row < rows; row += 32, i++) {
      const char* next = weights + bytes + i * lines * 2 * w.k;
      const bool wanted = panel + 1 < last && i * lines < all;
      K::multiply(share.level, a + row * w.k, std::min<int64_t>(32, rows - row), b, w.k, block,
                  {next, wanted ? lines : 0});
      epilogue(row, std::min<int64_t>(32, rows - row), panel * 32, block);
    }
  }
}

// Sixteen columns of a row of a block, scaled and with the bias added.
inline Sixteen sixteen(const Matrix& w, const float* block, int64_t row, int64_t column, int half) {
  Sixteen x = load(block + row * 32 + half * 16);
  if (w.scales) x = x * load(w.scales + column + half * 16);
  return w.bias ? x + load(w.bias + column + half * 16) : x;
}

inline int64_t numbers(const Matrix& w) { return w.n * w.k; }

template <class Call, class Body>
void together(const Call& c, int64_t weights, Body body) {
#pragma omp parallel num_threads(threads_for(c.rows * weights, c.threads))
  {
    const Tiles tiles(c.level);
    body(Share(c.rows, c.level));
  }
}

// Memory for a thread's A.
template <class K>
typename K::Packed* packed(int64_t count) {
  static thread_local Buffer<typename K::Packed> kept;
  return kept.get(count);
}

template <class K>
void linear(const Linear& c) {
  using Number = typename K::Number;
  const Matrix& w = c.weight;
  auto* out = static_cast<Number*>(c.out);
  together(c, numbers(w), [&](const Share& share) {
    const int64_t step = Share::rows_of<typename K::Packed>(w.k);
    auto* a = packed<K>(step * w.k);
    for (int64_t at = share.begin; at < share.end; at += step) {
      const int64_t end = std::min(share.end, at + step);
      pack<K>(c.x, at, end, w.k, a);
      product<K>(a, end - at, w, share,
                 [&](int64_t row, int64_t rows, int64_t column, float* block) {
                   for (int64_t r = 0; r < rows; r++) {
                     Number* to = out + (at + row + r) * w.n + column;
                     Number last[32];
                     const bool whole = column + 32 <= w.n;
                     K::put(sixteen(w, block, r, column, 0), sixteen(w, block, r, column, 1),
                            whole ? to : last);
                     if (!whole) std::copy(last, last + w.n - column, to);
                   }
                 });
    }
  });
}

// Norms one head and rotates it (Su et al. 2021), its halves against each other.
template <class K, class T = typename K::Number>
void rotate(const Project& c, const float* norm, const T* cos, const T* sin, T* head) {
  const Sixteen scale = all(norm ? inverse_rms(head, c.dim, c.eps) : 1);
  const int64_t half = c.rotary / 2;
  auto normed = [&](int64_t i) {
    const Sixteen x = load(head + i);
    return norm ? x * scale * load(norm + i) : x;
  };
  for (int64_t i = 0; i < half; i += 16) {
    const Sixteen x = normed(i), y = normed(i + half);
    K::put(x * load(cos + i) - y * load(sin + i), head + i);
    K::put(y * load(cos + half + i) + x * load(sin + half + i), head + half + i);
  }
  for (int64_t i = c.rotary; norm && i < c.dim; i += 16) K::put(normed(i), head + i);
}

template <class K>
void project(const Project& c) {
  using Number = typename K::Number;
  const Matrix& w = c.weight;
  auto* out = static_cast<Number*>(c.out);
  const auto *cos = static_cast<const Number*>(c.cos), *sin = static_cast<const Number*>(c.sin);
  together(c, numbers(w), [&](const Share& share) {
    const int64_t step = Share::rows_of<typename K::Packed>(w.k);
    auto* a = packed<K>(step * w.k);
    for (int64_t i = 0; i < share.most; i += step) {
      const int64_t at = std::min(share.end, share.begin + i), end = std::min(share.end, at + step);
      pack_normed<K>(c.x, c.norm, c.eps, at, end, w.k, a);
      product<K>(a, end - at, w, share,
                 [&](int64_t row, int64_t rows, int64_t column, float* block) {
                   for (int64_t r = 0; r < rows; r++)
                     K::put(sixteen(w, block, r, column, 0), sixteen(w, block, r, column, 1),
                            out + (at + row + r) * w.n + column);
                 });
      share.wait();
      if (share.part >= share.parts) continue;
      for (int64_t row = at + share.part; row < end; row += share.parts) {
        Number* head = out + row * w.n;
        for (int of = 0; of < 2; of++)
          for (int64_t h = 0; h < c.heads[of]; h++, head += c.dim)
            rotate<K>(c, c.heads_norm[of], cos + row * c.rotary, sin + row * c.rotary, head);
      }
    }
  });
}

template <class K>
void finish(const Finish& c) {
  using Number = typename K::Number;
  using Packed = typename K::Packed;
  const int64_t n = c.output.n, inner = c.down.k, widest = std::max({n, c.output.k, inner});
  const int64_t step = Share::rows_of<Packed>(widest);
  static thread_local Buffer<Number> middle_kept;
  static thread_local Buffer<Packed> inner_kept;
  Number* middle = middle_kept.get(c.rows * n);
  Packed* shared = inner_kept.get(c.threads * step * inner);
  const int64_t weights = numbers(c.output) + numbers(c.gate_up) + numbers(c.down);
  together(c, weights, [&](const Share& share) {
    Packed* a = packed<K>(step * widest);
    Packed* activated = shared + share.band * step * inner;
    for (int64_t i = 0; i < share.most; i += step) {
      const int64_t at = std::min(share.end, share.begin + i), end = std::min(share.end, at + step);
      auto add_to = [&](const Matrix& w, const void* x, void* to) {
        return [=, &w](int64_t row, int64_t rows, int64_t column, float* block) {
          for (int64_t r = 0; r < rows; r++) {
            const int64_t place = (at + row + r) * n + column;
            const Number* old = static_cast<const Number*>(x) + place;
            K::put(load(old) + sixteen(w, block, r, column, 0),
                   load(old + 16) + sixteen(w, block, r, column, 1),
                   static_cast<Number*>(to) + place);
          }
        };
      };
      pack<K>(c.attended, at, end, c.output.k, a);
      product<K>(a, end - at, c.output, share, add_to(c.output, c.x, middle));
      share.wait();
      pack_normed<K>(middle, c.norm, c.eps, at, end, n, a);
      product<K>(a, end - at, c.gate_up, share,
                 [&](int64_t row, int64_t rows, int64_t column, float* block) {
                   const int64_t to = column / 2;  // 16 columns of the result
                   for (int64_t r = 0; r < rows; r++)
                     K::put(K::silu(sixteen(c.gate_up, block, r, column, 0)) *
                                sixteen(c.gate_up, block, r, column, 1),
                            activated + K::at(row + r, to / 32 * 32, inner) + to % 32);
                 });
      share.wait();
      product<K>(activated, end - at, c.down, share, add_to(c.down, middle, c.out));
      if (i + step < share.most) share.wait();
    }
  });
}

template <class K>
void rms_norm(const Norm& c) {
  using Number = typename K::Number;
#pragma omp parallel for num_threads(threads_for(c.rows * c.n, c.threads)) schedule(static)
  for (int64_t row = 0; row < c.rows; row++) {
    const Number* from = static_cast<const Number*>(c.x) + row * c.n;
    const Sixteen scale = all(inverse_rms(from, c.n, c.eps));
    for (int64_t i = 0; i < c.n; i += 32)
      put_normed<K>(from + i, scale, c.weight + i, static_cast<Number*>(c.out) + row * c.n + i);
  }
}

}  // namespace

#define LAYERS(K, name)                                                          \
  extern "C" void batchrun_linear_##name(const Linear& c) { linear<K>(c); }       \
  extern "C" void batchrun_project_##name(const Project& c) { project<K>(c); }    \
  extern "C" void batchrun_finish_##name(const Finish& c) { finish<K>(c); }       \
  extern "C" void batchrun_rms_norm_##name(const Norm& c) { rms_norm<K>(c); }
