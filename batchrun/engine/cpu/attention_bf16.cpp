// Attention in bfloat16 on CPUs that multiply it: whole steps, over slots in place, in one call.
//
// A query's numbers depend on its own sequence alone, bit for bit: not on the batch, the threads or
// how a prompt was cut into segments. Keys are taken in parts of kPart tokens that begin at
// multiples of kPart. Each part has a softmax of its own, and its sums are added to those of the
// parts before (Flash-Decoding). A token that a query may not see adds an exact 0. So a query that
// is computed among others (a prompt's) and one alone (a decode) go through the same additions.
//
//   task    queries [tokens, group] that share key heads: of a prompt, or of decodes whose sequences
//           have a part in common, which is read once for all of them
//   part    K packed to tiles [32 of k_dim, 16 tokens], V to tiles [32 tokens, 16 of v_dim]
//   panel   at most kPanel queries of one key head:
//             scores = Q . K, weights = 2^(scores - highest), sums = weights . V
//
// Tiles are 16 rows of 16 pairs of numbers: what AMX multiplies, and AVX512-BF16 row by row.
// No byte behind a sequence's last token is read: there is no memory.

#include "common.h"

#include <atomic>

using Call = AttentionCall<uint16_t>;

FILLED_BY_PYTHON(Call, Call, 36)

namespace {

constexpr int64_t kBlock = 32;
constexpr int64_t kPart = 128;
constexpr int64_t kPanel = 32;
constexpr int64_t kScores = kPart + 16;    // strides of a panel's rows: no powers of 2
constexpr int64_t kWeights = kPart + 32;
constexpr int64_t kRows = 192;             // queries of a task: enough to be worth packing for
constexpr int64_t kPacked = 512 * 1024;    // bytes of packed heads that stay in the L2 cache
constexpr float kLog2e = 1.44269504f;
constexpr float kLowest = -3e38f;          // the highest score of no tokens

inline __m512 all(float x) { return _mm512_set1_ps(x); }

// 2^x to a part in 300,000; exactly 1 of 0.
inline __m512 power(__m512 x) {
  const __m512 r = _mm512_reduce_ps(x, 0x09);  // what is left of x above the next whole number
  __m512 p = _mm512_fmadd_ps(all(0.0134267087f), r, all(0.0522424355f));
  p = _mm512_fmadd_ps(p, r, all(0.2412802279f));
  p = _mm512_fmadd_ps(p, r, all(0.6930448413f));
  p = _mm512_fmadd_ps(p, r, all(1.0f));
  return _mm512_scalef_ps(p, x);
}

inline float power(float x) { return _mm512_cvtss_f32(power(all(x))); }

// ---- tiles ----

// c [rows, 16 cols] = a [rows, 32 depth] . b, whose tiles of a column lie one behind the other and
// those of the next one `step` on. cols is even. a and c have room for multiples of 16.
struct Product {
  const uint16_t* a;
  int64_t a_stride, rows;
  const uint16_t* b;
  int64_t step, cols, depth;
  float* c;
  int64_t c_stride;
};

void multiply_vectors(const Product& p) {
  for (int64_t r = 0; r < p.rows; r += 4)
    for (int64_t n = 0; n < p.cols; n += 2) {
      const uint16_t *left = p.b + n * p.step, *right = left + p.step;
      const uint16_t* a = p.a + r * p.a_stride;
      __m512 sum[4][2] = {};
      for (int64_t k = 0; k < p.depth * 16; k++) {
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
    for (int64_t k = 0; k < p.depth; k++) {
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

// ---- packing ----

// A block of one head, of which `count` tokens are there: 0 beyond them and beyond `dim`.
// Returns it, or a copy with the zeros, and sets the stride to match.
inline const uint16_t* whole(const uint16_t* from, int64_t* stride, int64_t count, int64_t dim,
                             uint16_t* copy) {
  if (count >= kBlock && dim % 32 == 0) return from;
  const int64_t width = round_up(dim, 32);
  for (int64_t t = 0; t < kBlock; t++)
    for (int64_t d = 0; d < width; d += 32) {
      const int64_t left = t < count ? std::min<int64_t>(dim - d, 32) : 0;
      const auto mask = __mmask32((uint64_t(1) << left) - 1);
      _mm512_storeu_si512(copy + t * width + d,
                          _mm512_maskz_loadu_epi16(mask, from + t * *stride + d));
    }
  *stride = width;
  return copy;
}

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

// ---- softmax ----

// The highest of the scores at tokens [begin, end), in each lane. Those elsewhere in [from, to), a
// range of whole blocks, become -inf.
inline __m512 highest(float* scores, int64_t from, int64_t to, int64_t begin, int64_t end) {
  const __m512 none = all(-std::numeric_limits<float>::infinity());
  auto hide = [&](int64_t t, __mmask16 hidden) {  // stored whole: loads wait for masked stores
    _mm512_store_ps(scores + t, _mm512_mask_mov_ps(_mm512_load_ps(scores + t), hidden, none));
  };
  for (int64_t t = from; t < std::min(begin, to); t += 16)
    hide(t, _mm512_cmplt_epi32_mask(lanes(), _mm512_set1_epi32(begin - t)));
  for (int64_t t = std::max(from, end / 16 * 16); t < to; t += 16)
    hide(t, _mm512_cmpge_epi32_mask(lanes(), _mm512_set1_epi32(end - t)));
  __m512 most = none, other = none;
  for (int64_t t = from; t < to; t += kBlock) {
    most = _mm512_max_ps(most, _mm512_load_ps(scores + t));
    other = _mm512_max_ps(other, _mm512_load_ps(scores + t + 16));
  }
  most = _mm512_max_ps(most, other);
  most = _mm512_max_ps(most, _mm512_shuffle_f32x4(most, most, 0x4e));
  most = _mm512_max_ps(most, _mm512_shuffle_f32x4(most, most, 0xb1));
  most = _mm512_max_ps(most, _mm512_permute_ps(most, 0x4e));
  return _mm512_max_ps(most, _mm512_permute_ps(most, 0xb1));
}

// weights = 2^(scores * scale - top); returns lanes that sum to their total, as they are rounded.
inline __m512 weigh(const float* scores, uint16_t* weights, int64_t from, int64_t to, __m512 scale,
                    __m512 top) {
  const auto ones = (__m512bh)_mm512_set1_epi32(0x3f803f80);
  __m512 sum = _mm512_setzero_ps();
  for (int64_t t = from; t < to; t += kBlock) {
    const __m512 x = power(_mm512_fmsub_ps(_mm512_load_ps(scores + t), scale, top));
    const __m512 y = power(_mm512_fmsub_ps(_mm512_load_ps(scores + t + 16), scale, top));
    const __m512bh both = _mm512_cvtne2ps_pbh(y, x);
    _mm512_store_si512(weights + t, (__m512i)both);
    sum = _mm512_dpbf16_ps(sum, both, ones);
  }
  return sum;
}

// scores = cap * tanh(scores * inverse): the cap is in units of log2(e), and so are they then.
inline void cap_scores(float* scores, int64_t from, int64_t to, float cap, float inverse) {
  const __m512 limit = all(20.0f);
  for (int64_t t = from; t < to; t += 16) {
    __m512 x = _mm512_mul_ps(_mm512_load_ps(scores + t), all(inverse));
    x = _mm512_max_ps(_mm512_min_ps(limit, x), _mm512_sub_ps(_mm512_setzero_ps(), limit));
    const __m512 y = _mm512_add_ps(power(_mm512_mul_ps(x, all(2 * kLog2e))), all(1.0f));
    x = _mm512_sub_ps(all(1.0f), _mm512_div_ps(all(2.0f), y));
    _mm512_store_ps(scores + t, _mm512_mul_ps(x, all(cap)));
  }
}

// What is known of one query after some parts: sums [v_width], total weight [16] in lanes that sum
// to it, highest score [16] in each lane.
struct State {
  float* sums;
  int64_t width;

  static int64_t size(int64_t width) { return width + 32; }
  float* top() const { return sums + width + 16; }

  void clear() const {
    std::fill(sums, top(), 0.0f);
    std::fill(top(), top() + 16, kLowest);
  }

  // Adds a part's sums and total. One of no tokens changes nothing; one to no tokens is copied.
  void add(const float* part, __m512 part_top) const {
    const __m512 most = _mm512_max_ps(_mm512_load_ps(top()), part_top);
    const __m512 old = power(_mm512_sub_ps(_mm512_load_ps(top()), most));
    const __m512 scale = power(_mm512_sub_ps(part_top, most));
    for (int64_t d = 0; d < width + 16; d += 16) {
      const __m512 sum = _mm512_mul_ps(_mm512_load_ps(sums + d), old);
      _mm512_store_ps(sums + d, _mm512_fmadd_ps(_mm512_load_ps(part + d), scale, sum));
    }
    _mm512_store_ps(top(), most);
  }

  void finish(const Call& c, int64_t token, int64_t head) const {
    float scale = 1, total = _mm512_reduce_add_ps(_mm512_load_ps(sums + width));
    if (c.sinks) {
      const float sink = c.sinks[head] * kLog2e, most = std::max(*top(), sink);
      scale = power(*top() - most);
      total = __builtin_fmaf(total, scale, power(sink - most));
    }
    uint16_t* out = c.out + (token * c.q_heads + head) * c.v_dim;
    for (int64_t d = 0; d < c.v_dim; d += 16) {
      const auto mask = __mmask16((1u << std::min<int64_t>(c.v_dim - d, 16)) - 1);
      const __m512 x = _mm512_mul_ps(_mm512_load_ps(sums + d), all(scale / total));
      _mm256_mask_storeu_epi16(out + d, mask, (__m256i)_mm512_cvtneps_pbh(x));
    }
  }
};

// ---- tasks ----

struct Task {
  int64_t segment, head, heads;  // whose keys, and key heads
  int64_t token, tokens;         // of the segment's queries; of decodes: 0, and how many
  int64_t begin, end;            // tokens that they attend to
  const int64_t* decodes;        // of a part: segments; of a prompt: null
  float* const* states;          // of each decode: [q_heads, state]
};

struct Shape {
  explicit Shape(const Call& call) : c(call) {}

  const Call& c;
  const int64_t group = c.q_heads / c.kv_heads;
  const int64_t k_width = round_up(c.k_dim, 32), v_width = round_up(c.v_dim, 32);
  const int64_t state = State::size(v_width);
};

class Worker : Shape {
 public:
  explicit Worker(const Call& call)
      : Shape(call), multiply(call.level == kTiles ? multiply_tiles : multiply_vectors) {}

  // Puts a segment's new token's keys and values of some heads into the slot.
  void write(int64_t segment, int64_t query, int64_t token, int64_t head, int64_t heads) const {
    for (int64_t h = head; h < head + heads; h++) {
      const uint16_t* k = c.new_keys + query * c.new_key_stride[0] + h * c.new_key_stride[1];
      const uint16_t* v = c.new_values + query * c.new_value_stride[0] + h * c.new_value_stride[1];
      std::copy(k, k + c.k_dim, const_cast<uint16_t*>(key(segment, h, token)));
      std::copy(v, v + c.v_dim, const_cast<uint16_t*>(value(segment, h, token)));
    }
  }

  void run(const Task& task, const Task* next) {
    const int64_t rows = task.tokens * group;
    // A decode's new token is written where it is read: its page is found once.
    if (task.decodes && c.new_keys && task.end == c.ends[task.segment])
      write(task.segment, c.starts[task.segment], task.end - 1, task.head, task.heads);
    reserve(task, rows);
    const int64_t row_space = round_up(rows, kPanel);
    for (int64_t h = 0; h < task.heads; h++) {
      for (int64_t row = 0; row < rows; row++) state_of(task, h, row).clear();
      pack_queries(task, h, queries + h * row_space * k_width);
    }
    for (int64_t base = task.begin / kPart * kPart; base < task.end; base += kPart) {
      pack(task, base, next);
      for (int64_t h = 0; h < task.heads; h++)
        for (int64_t row = 0; row < rows; row += kPanel)
          panel(task, base, h, row, std::min(kPanel, rows - row),
                queries + (h * row_space + row) * k_width);
    }
    if (task.decodes) return;
    for (int64_t h = 0; h < task.heads; h++)
      for (int64_t row = 0; row < rows; row++)
        state_of(task, h, row).finish(c, token_of(task, row), head_of(task, h, row));
  }

 private:
  void (*const multiply)(const Product&);
  uint16_t *queries, *keys, *values, *weights, *copy;
  float *scores, *sums, *own_states;

  void reserve(const Task& task, int64_t rows) {
    static thread_local Buffer<char> buffer;
    const int64_t space = round_up(rows, kPanel);
    const int64_t halves[] = {task.heads * space * k_width, task.heads * kPart * k_width,
                              task.heads * kPart * v_width, kPanel * kWeights,
                              kBlock * std::max(k_width, v_width)};
    const int64_t floats[] = {kPanel * kScores, kPanel * (v_width + 16), task.heads * rows * state};
    int64_t bytes = 0;
    for (int64_t n : halves) bytes += n * 2;
    for (int64_t n : floats) bytes += n * 4;
    char* at = buffer.get(bytes);
    uint16_t** const half[] = {&queries, &keys, &values, &weights, &copy};
    float** const single[] = {&scores, &sums, &own_states};
    for (int i = 0; i < 5; at += halves[i++] * 2) *half[i] = reinterpret_cast<uint16_t*>(at);
    for (int i = 0; i < 3; at += floats[i++] * 4) *single[i] = reinterpret_cast<float*>(at);
  }

  const uint16_t* key(int64_t segment, int64_t head, int64_t token) const {
    return c.keys + c.slots[segment] * c.key_stride[0] + token * c.key_stride[1] +
           head * c.key_stride[2];
  }

  const uint16_t* value(int64_t segment, int64_t head, int64_t token) const {
    return c.values + c.slots[segment] * c.value_stride[0] + token * c.value_stride[1] +
           head * c.value_stride[2];
  }

  State state_of(const Task& task, int64_t h, int64_t row) const {
    float* at = task.decodes
                    ? task.states[row / group] + head_of(task, h, row) * state
                    : own_states + (h * task.tokens * group + row) * state;
    return {at, v_width};
  }

  int64_t token_of(const Task& task, int64_t row) const {
    if (task.decodes) return c.starts[task.decodes[row / group]];
    return c.starts[task.segment] + task.token + row / group;
  }

  int64_t head_of(const Task& task, int64_t h, int64_t row) const {
    return (task.head + h) * group + row % group;
  }

  int64_t position(const Task& task, int64_t row) const {
    if (task.decodes) return c.ends[task.segment] - 1;  // behind what several have in common
    const int64_t length = c.starts[task.segment + 1] - c.starts[task.segment];
    return c.ends[task.segment] - length + task.token + row / group;
  }

  void pack_queries(const Task& task, int64_t h, uint16_t* to) const {
    for (int64_t row = 0; row < task.tokens * group; row++, to += k_width) {
      const uint16_t* from = c.query + token_of(task, row) * c.query_stride[0] +
                             head_of(task, h, row) * c.query_stride[1];
      std::copy(from, from + c.k_dim, to);
      std::fill(to + c.k_dim, to + k_width, uint16_t(0));
    }
  }

  // Packs what the task needs of a part. Tokens may lie pages apart, which no hardware prefetches:
  // the next block is asked for, all at once. Between the tiles fewer pages would be looked up at a
  // time.
  void pack(const Task& task, int64_t base, const Task* next) {
    const int64_t end = std::min(base + kPart, task.end);
    for (int64_t t = std::max(base, task.begin / kBlock * kBlock); t < end; t += kBlock) {
      if (t + kBlock < task.end) {
        prefetch(task, t + kBlock);
      } else if (next) {
        prefetch(*next, next->begin);
      }
      const int64_t block = (t - base) / kBlock;
      for (int64_t h = 0; h < task.heads; h++) {
        int64_t stride = c.key_stride[1];
        const uint16_t* k = whole(key(task.segment, task.head + h, t), &stride, task.end - t,
                                  c.k_dim, copy);
        uint16_t* to = keys + (h * kPart + block * kBlock) * k_width;
        for (int64_t half = 0; half < 2; half++, k += 16 * stride)
          for (int64_t d = 0; d < k_width; d += 32, to += kTile) pack_key(k + d, stride, to);
        stride = c.value_stride[1];
        const uint16_t* v = whole(value(task.segment, task.head + h, t), &stride, task.end - t,
                                  c.v_dim, copy);
        to = values + h * kPart * v_width + block * kTile;
        for (int64_t d = 0; d < v_width; d += 16, to += kPart / kBlock * kTile)
          pack_value(v + d, stride, to);
      }
    }
  }

  // Inlined: calls that only prefetch are dropped as if they did nothing.
  __attribute__((always_inline)) void prefetch(const Task& task, int64_t token) const {
    auto ask = [&](const uint16_t* from, int64_t stride, int64_t dim) {
      for (int64_t h = 0; h < task.heads; h++, from += stride)
        for (int64_t d = 0; d < dim; d += 32) __builtin_prefetch(from + d, 0, 2);
    };
    for (const int64_t end = std::min(token + kBlock, task.end); token < end; token++) {
      ask(key(task.segment, task.head, token), c.key_stride[2], c.k_dim);
      ask(value(task.segment, task.head, token), c.value_stride[2], c.v_dim);
    }
  }

  // `rows` queries from `row` on, against one part of one head.
  void panel(const Task& task, int64_t base, int64_t h, int64_t row, int64_t rows,
             const uint16_t* query) {
    const int64_t first = position(task, row), last = position(task, row + rows - 1);
    const int64_t lowest = c.window ? std::max<int64_t>(0, first - c.window + 1) : 0;
    const int64_t from = std::max<int64_t>(0, lowest - base) / kBlock * kBlock;
    const int64_t to = std::min(kPart, round_up(last + 1 - base, kBlock));
    if (from >= to) return;
    const uint16_t* k = keys + (h * kPart + from) * k_width;
    multiply({query, k_width, rows, k, k_width * 16, (to - from) / 16, k_width / 32,
              scores + from, kScores});
    const int64_t width = v_width + 16;  // sums and total
    const __m512 scale = all(c.softcap > 0 ? 1 : c.scale * kLog2e);
    __m512 tops[kPanel];
    for (int64_t r = 0, end = first + 1 - base, left = group - row % group; r < rows; r++, left--) {
      if (!left) {
        left = group;
        end += !task.decodes;
      }
      float* score = scores + r * kScores;
      if (c.softcap > 0) cap_scores(score, from, to, c.softcap * kLog2e, c.scale / c.softcap);
      const __m512 most = highest(score, from, to, c.window ? end - c.window : from, end);
      tops[r] = _mm512_max_ps(all(kLowest), _mm512_mul_ps(most, scale));
    }
    for (int64_t r = 0; r < rows; r++) {
      const __m512 total =
          weigh(scores + r * kScores, weights + r * kWeights, from, to, scale, tops[r]);
      _mm512_store_ps(sums + r * width + v_width, total);
    }
    const uint16_t* v = values + h * kPart * v_width + from / kBlock * kTile;
    multiply({weights + from, kWeights, rows, v, kPart / kBlock * kTile, v_width / 16,
              (to - from) / kBlock, sums, width});
    for (int64_t r = 0; r < rows; r++)
      state_of(task, h, row + r).add(sums + r * width, tops[r]);
  }
};

// What is to be computed for a step, and the states of its decodes' parts.
class Step : Shape {
 public:
  explicit Step(const Call& call) : Shape(call), firsts(c.n + 1) {
    for (int64_t i = 0; i < c.n; i++) {
      const int64_t end = c.ends[i];
      firsts[i + 1] = firsts[i];
      if (is_decode(i)) firsts[i + 1] += (end - 1) / kPart + 1 - begin(end - 1) / kPart;
    }
    static thread_local Buffer<float> kept;
    states = kept.get(firsts[c.n] * c.q_heads * state);
    decodes.reserve(firsts[c.n]);  // pointers to them stay
    places.reserve(firsts[c.n]);
    add_shared();
    for (int64_t i = 0; i < c.n; i++)
      if (!is_decode(i)) add_prompt(i);
    for (int64_t i = 0; i < c.n; i++)
      if (is_decode(i)) add_own(i);
  }

  std::vector<Task> tasks;

  bool is_decode(int64_t segment) const { return c.starts[segment + 1] - c.starts[segment] == 1; }

  // Adds up the parts of one query.
  void finish(int64_t segment, int64_t head) const {
    const State sum = part(firsts[segment], head);
    for (int64_t p = firsts[segment] + 1; p < firsts[segment + 1]; p++)
      sum.add(part(p, head).sums, _mm512_load_ps(part(p, head).top()));
    sum.finish(c, c.starts[segment], head);
  }

 private:
  std::vector<int64_t> firsts;  // the first part of each segment, of all decodes'
  float* states;                // [parts, q_heads, state]
  std::vector<int64_t> decodes;
  std::vector<float*> places;

  State part(int64_t number, int64_t head) const {
    return {states + (number * c.q_heads + head) * state, v_width};
  }

  int64_t begin(int64_t position) const {
    return c.window ? std::max<int64_t>(0, position - c.window + 1) : 0;
  }

  void take(int64_t segment, int64_t number) {
    decodes.push_back(segment);
    places.push_back(part(firsts[segment] + number, 0).sums);
  }

  // A part [from, to) of the decodes that were taken last.
  void add(int64_t count, int64_t from, int64_t to) {
    const auto at = int64_t(decodes.size()) - count;
    const int64_t fit = std::min(kPacked / (kPart * (k_width + v_width) * 2),
                                 count > 1 ? kRows / (count * group) : c.kv_heads);
    for (int64_t head = 0, heads; head < c.kv_heads; head += heads) {
      heads = std::min(c.kv_heads - head, std::max<int64_t>(1, fit));
      tasks.push_back({decodes[at], head, heads, 0, count, from, to, &decodes[at], &places[at]});
    }
  }

  void add_shared() {
    const int64_t most = std::max<int64_t>(1, kRows / group);
    for (int64_t i = 0; i < (c.window ? 0 : c.n_shared); i++) {
      const int64_t number = c.shared_part[i], end = c.shared_starts[i + 1];
      for (int64_t at = c.shared_starts[i], count; at < end; at += count) {
        count = std::min(most, end - at);
        for (int64_t m = at; m < at + count; m++) take(c.shared_members[m], number);
        add(count, number * kPart, (number + 1) * kPart);
      }
    }
  }

  void add_prompt(int64_t segment) {
    const int64_t tokens = std::max<int64_t>(1, kRows / group);
    const int64_t length = c.starts[segment + 1] - c.starts[segment];
    for (int64_t token = (length - 1) / tokens * tokens; token >= 0; token -= tokens) {
      const int64_t count = std::min(tokens, length - token);
      const int64_t first = c.ends[segment] - length + token;
      for (int64_t head = 0; head < c.kv_heads; head++)
        tasks.push_back({segment, head, 1, token, count, begin(first), first + count});
    }
  }

  void add_own(int64_t segment) {
    const int64_t end = c.ends[segment];
    const int64_t skipped = c.window || !c.n_shared ? 0 : c.own_part[segment];
    int64_t from = std::max(begin(end - 1), skipped * kPart);
    for (int64_t p = skipped; p < firsts[segment + 1] - firsts[segment]; p++) {
      const int64_t to = std::min(end, (from / kPart + 1) * kPart);
      take(segment, p);
      add(1, from, to);
      from = to;
    }
  }
};

}  // namespace

extern "C" int64_t batchrun_part() { return kPart; }

extern "C" void batchrun_attend(const Call& c) {
  const Step step(c);
  const auto num_tasks = int64_t(step.tasks.size());
  std::atomic<int64_t> taken{0};
#pragma omp parallel num_threads(c.threads)
  {
    Worker worker(c);
    if (c.new_keys && c.starts[c.n] > c.n) {  // prompts
      for (int64_t i = 0; i < c.n; i++) {
        const int64_t first = c.starts[i], length = c.starts[i + 1] - first;
        if (step.is_decode(i)) continue;
#pragma omp for schedule(static) nowait
        for (int64_t t = 0; t < length; t++)
          worker.write(i, first + t, c.ends[i] - length + t, 0, c.kv_heads);
      }
#pragma omp barrier
    }
    {
      const Tiles tiles(c.level);
      for (int64_t i = taken++; i < num_tasks;) {
        const int64_t next = taken++;  // a task early, to ask for its keys
        worker.run(step.tasks[i], next < num_tasks ? &step.tasks[next] : nullptr);
        i = next;
      }
    }
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t i = 0; i < c.n * c.q_heads; i++)
      if (step.is_decode(i / c.q_heads)) step.finish(i / c.q_heads, i % c.q_heads);
  }
}
