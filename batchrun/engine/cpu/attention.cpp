// Decode attention on a CPU: one query a sequence, over slots in place, all sequences in one call.
//
// The work is cut into parts of kPart tokens of one sequence, which the cores take as they get free;
// each computes a softmax over its own tokens alone, and a last pass combines the parts (Flash-
// Decoding). Parts depend on the sequence and on nothing else, so neither do its numbers.
//
//   keys    slot s: | token 0: head 0, head 1, ..  ...other layers...  | token 1: head 0, .. | ..
//   part    tokens [begin, end) in blocks of kBlock; for each key head of a block
//             rows   [kBlock, width]  K, then V, widened to float and packed: each byte of the slot
//                                     is read once, whatever its stride and however many queries
//             scores [group, kBlock]  of the query heads that share the key head
//             sums   [q_heads, width] of V, by the weights of an online softmax
//
// No byte behind a sequence's last token is read: there is no memory.

#include "common.h"

#include <type_traits>

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int kPanel = kLanes == 16 ? 4 : 2;  // vectors of V whose sums of 4 heads fit registers
constexpr int64_t kBlock = 32;
constexpr int64_t kPart = 256;

typedef float Vec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));

FILLED_BY_PYTHON(Call, AttentionCall<float>, 36)

namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();

struct Part {
  int64_t row, begin, end;
};

inline void narrow(float x, float* to) { *to = x; }

inline void narrow(float x, uint16_t* to) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  *to = std::isnan(x) ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline int64_t padded(int64_t dim) { return round_up(dim, kLanes); }

inline Vec load(const float* from) { return *reinterpret_cast<const Vec*>(from); }

inline void store(Vec x, float* to) { *reinterpret_cast<Vec*>(to) = x; }

inline Vec all(float x) { return x - Vec{}; }

inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }  // b where either is no number

// exp, to 2 units in the last place; 0 below -87.
inline Vec exp(Vec x) {
  const Vec magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to whole numbers
  const Vec low = all(-87.0f);
  Vec y = larger(low, x);
  Vec shifted = y * 1.44269504f + magic;
  Vec whole = shifted - magic;
  Vec r = y - whole * 0.693359375f + whole * 2.12194440e-4f;
  Vec p = 1.9875691500e-4f * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  Ints power = ((Ints)shifted << 23) + 0x3f800000;
  return x < low ? Vec{} : p * (Vec)power;
}

inline Vec tanh(Vec x) {
  Vec bounded = larger(all(-20.0f), -larger(all(-20.0f), -x));
  return 1.0f - 2.0f / (exp(bounded * 2.0f) + 1.0f);
}

// One step of summing kLanes vectors: sums of pairs of `run` lanes, x's and then y's.
template <int run>
inline Vec fold(Vec x, Vec y) {
  Ints low, high;
  for (int i = 0; i < kLanes; i++) {
    low[i] = i / run * 2 * run + i % run;
    high[i] = low[i] + run;
  }
  return __builtin_shuffle(x, y, low) + __builtin_shuffle(x, y, high);
}

// The sum of each of `count` vectors' lanes; lane i is that of vectors[i] where count is kLanes.
template <int count>
inline Vec sums(const Vec* vectors) {
  if constexpr (count == 1) {
    return vectors[0];
  } else {
    return fold<kLanes / count>(sums<count / 2>(vectors), sums<count / 2>(vectors + count / 2));
  }
}

inline float highest(const float* x, int64_t count) {
  Vec most = load(x);
  for (int64_t i = kLanes; i < count; i += kLanes) most = larger(most, load(x + i));
  float found = most[0];
  for (int i = 1; i < kLanes; i++) found = std::max(found, most[i]);
  return found;
}

// Widens a block of the `left` tokens of one head to rows [kBlock, padded(dim)]; what is beyond
// becomes 0. Tokens may lie pages apart, which no hardware prefetches: the next block is asked for.
template <class T>
inline void pack(const T* from, int64_t stride, int64_t left, int64_t dim, float* rows) {
  const int64_t width = padded(dim), count = std::min(kBlock, left);
  for (int64_t t = 0; t < count; t++, from += stride, rows += width) {
    if (t + kBlock < left)
      for (int64_t d = 0; d < dim; d += 64 / sizeof(T))
        __builtin_prefetch(from + kBlock * stride + d);
#pragma GCC ivdep
    for (int64_t d = 0; d < dim; d++) rows[d] = widen(from[d]);
    for (int64_t d = dim; d < width; d++) rows[d] = 0;
  }
  std::memset(rows, 0, (kBlock - count) * width * sizeof(float));
}

// scores[t] = query . rows[t], for a whole block.
inline void multiply(const float* query, const float* rows, int64_t width, float* scores) {
  for (int64_t t = 0; t < kBlock; t += kLanes, rows += kLanes * width) {
    Vec sum[kLanes] = {};
    for (int64_t d = 0; d < width; d += kLanes) {
      Vec q = load(query + d);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; i++) sum[i] += q * load(rows + i * width + d);
    }
    store(sums<kLanes>(sum), scores + t);
  }
}

// sums[h] = sums[h] * decay[h] + weights[h] . rows, for `heads` query heads.
template <int heads>
inline void accumulate(const float* weights, const float* decay, const float* rows, int64_t width,
                       float* sums) {
  for (int64_t d = 0; d < width;) {
    auto panel = [&](auto vectors) {
      constexpr int count = decltype(vectors)::value;
      Vec sum[heads][count];
      for (int h = 0; h < heads; h++)
        for (int i = 0; i < count; i++)
          sum[h][i] = load(sums + h * width + d + i * kLanes) * decay[h];
      for (int64_t t = 0; t < kBlock; t++)
        for (int i = 0; i < count; i++) {
          Vec v = load(rows + t * width + d + i * kLanes);
          for (int h = 0; h < heads; h++) sum[h][i] += weights[h * kBlock + t] * v;
        }
      for (int h = 0; h < heads; h++)
        for (int i = 0; i < count; i++) store(sum[h][i], sums + h * width + d + i * kLanes);
      d += count * kLanes;
    };
    if (width - d >= kPanel * kLanes) {
      panel(std::integral_constant<int, kPanel>());
    } else {
      panel(std::integral_constant<int, 1>());
    }
  }
}

// Of one part: sums [q_heads, padded(v_dim)], and each query head's highest score and total weight.
template <class T>
void attend(const AttentionCall<T>& c, const Part& part, float* sums, float* top, float* total,
            Buffer<float>& buffer) {
  const int64_t k_width = padded(c.k_dim), v_width = padded(c.v_dim);
  const int64_t group = c.q_heads / c.kv_heads, slot = c.slots[part.row];
  const T* keys = c.keys + slot * c.key_stride[0];
  const T* values = c.values + slot * c.value_stride[0];
  float* queries = buffer.get(c.q_heads * k_width + kBlock * (std::max(k_width, v_width) + group) +
                              group);
  float* rows = queries + c.q_heads * k_width;
  float* scores = rows + kBlock * std::max(k_width, v_width);
  float* decay = scores + group * kBlock;
  for (int64_t h = 0; h < c.q_heads; h++) {
    const T* query = c.query + part.row * c.query_stride[0] + h * c.query_stride[1];
    for (int64_t d = 0; d < k_width; d++)
      queries[h * k_width + d] = d < c.k_dim ? widen(query[d]) * c.scale : 0;
  }
  std::fill(sums, sums + c.q_heads * v_width, 0.0f);
  std::fill(top, top + c.q_heads, kNone);
  std::fill(total, total + c.q_heads, 0.0f);
  for (int64_t t = part.begin; t < part.end; t += kBlock) {
    const int64_t count = std::min(kBlock, part.end - t);
    for (int64_t head = 0; head < c.kv_heads; head++) {
      const int64_t first = head * group;
      pack(keys + t * c.key_stride[1] + head * c.key_stride[2], c.key_stride[1], part.end - t,
           c.k_dim, rows);
      for (int64_t g = 0; g < group; g++) {
        float* score = scores + g * kBlock;
        multiply(queries + (first + g) * k_width, rows, k_width, score);
        if (c.softcap > 0)
          for (int64_t i = 0; i < kBlock; i += kLanes)
            store(tanh(load(score + i) / c.softcap) * c.softcap, score + i);
        std::fill(score + count, score + kBlock, kNone);
        const float highest_yet = std::max(top[first + g], highest(score, kBlock));
        decay[g] = std::exp(top[first + g] - highest_yet);
        top[first + g] = highest_yet;
        Vec weight{};
        for (int64_t i = 0; i < kBlock; i += kLanes) {
          Vec w = exp(load(score + i) - highest_yet);
          store(w, score + i);
          weight += w;
        }
        float sum = 0;
        for (int i = 0; i < kLanes; i++) sum += weight[i];
        total[first + g] = total[first + g] * decay[g] + sum;
      }
      pack(values + t * c.value_stride[1] + head * c.value_stride[2], c.value_stride[1],
           part.end - t, c.v_dim, rows);
      for (int64_t g = 0; g < group;) {
        const float *w = scores + g * kBlock, *old = decay + g;
        float* to = sums + (first + g) * v_width;
        switch (std::min<int64_t>(group - g, 4)) {
          case 1: accumulate<1>(w, old, rows, v_width, to); g += 1; break;
          case 2: accumulate<2>(w, old, rows, v_width, to); g += 2; break;
          case 3: accumulate<3>(w, old, rows, v_width, to); g += 3; break;
          default: accumulate<4>(w, old, rows, v_width, to); g += 4;
        }
      }
    }
  }
}

template <class T>
void decode(const AttentionCall<T>& c) {
  static thread_local Buffer<float> kept;
  const int64_t v_width = padded(c.v_dim), size = c.q_heads * (v_width + 2);
  std::vector<Part> parts;
  std::vector<int64_t> firsts;  // each row's first part, and the end
  for (int64_t row = 0; row < c.n; row++) {
    firsts.push_back(parts.size());
    int64_t begin = c.window ? std::max<int64_t>(0, c.ends[row] - c.window) : 0;
    for (; begin < c.ends[row]; begin += kPart)
      parts.push_back({row, begin, std::min<int64_t>(begin + kPart, c.ends[row])});
  }
  firsts.push_back(parts.size());
  const int64_t num_parts = parts.size();
  float* memory = kept.get(num_parts * size);  // of a part: sums, highest scores, total weights
#pragma omp parallel num_threads(c.threads)
  {
    static thread_local Buffer<float> buffer;
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < num_parts; i++) {
      float *sums = memory + i * size, *top = sums + c.q_heads * v_width;
      attend<T>(c, parts[i], sums, top, top + c.q_heads, buffer);
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < c.n * c.q_heads; i++) {
      const int64_t row = i / c.q_heads, head = i % c.q_heads;
      float* first = memory + firsts[row] * size;
      float* sum = first + head * v_width;
      const int64_t count = firsts[row + 1] - firsts[row], top = c.q_heads * v_width + head;
      float most = c.sinks ? c.sinks[head] : kNone;
      for (int64_t p = 0; p < count; p++) most = std::max(most, first[p * size + top]);
      float total = c.sinks ? std::exp(c.sinks[head] - most) : 0;
      for (int64_t p = 0; p < count; p++) {
        const float weight = std::exp(first[p * size + top] - most);
        total += first[p * size + top + c.q_heads] * weight;
        const float* other = sum + p * size;
        for (int64_t d = 0; d < v_width; d++)
          sum[d] = p ? sum[d] + other[d] * weight : other[d] * weight;
      }
      T* out = c.out + i * c.v_dim;
      for (int64_t d = 0; d < c.v_dim; d++) narrow(sum[d] / total, out + d);
    }
  }
}

}  // namespace

extern "C" void batchrun_decode_float32(const AttentionCall<float>* call) { decode(*call); }

extern "C" void batchrun_decode_bfloat16(const AttentionCall<uint16_t>* call) { decode(*call); }
