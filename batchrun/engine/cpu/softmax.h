// A softmax that is computed in parts (Flash-Decoding), for attention.h.

#pragma once

#include "vectors.h"

namespace {

constexpr int64_t kBlock = 32;     // tokens
constexpr float kLog2e = 1.44269504f;
constexpr float kLowest = -3e38f;  // the highest score of no tokens

// Scores at tokens [begin, end) stay; those elsewhere in [from, to), a range of whole blocks, become
// -inf. Returns the highest, in all lanes.
inline Sixteen highest(float* scores, int64_t from, int64_t to, int64_t begin, int64_t end) {
  const Sixteen none = all(-std::numeric_limits<float>::infinity());
  for (int64_t t = from; t < std::min(begin, to); t += 16)
    store(before(begin - t, none, load(scores + t)), scores + t);
  for (int64_t t = std::max(from, end / 16 * 16); t < to; t += 16)
    store(before(end - t, load(scores + t), none), scores + t);
  Sixteen most = none, other = none;
  for (int64_t t = from; t < to; t += kBlock) {
    most = larger(most, load(scores + t));
    other = larger(other, load(scores + t + 16));
  }
  return largest(larger(most, other));
}

// scores = cap * tanh(scores * inverse): the cap is in units of log2(e), and so are they then.
template <class K>
inline void cap_scores(float* scores, int64_t from, int64_t to, float cap, float inverse) {
  const Sixteen limit = all(20), none = all(0);
  for (int64_t t = from; t < to; t += 16) {
    Sixteen x = load(scores + t) * all(inverse);
    x = larger(none - larger(none - x, none - limit), none - limit);
    const Sixteen y = K::power(x * all(2 * kLog2e)) + all(1);
    store((all(1) - all(2) / y) * all(cap), scores + t);
  }
}

// What is known of one query after some parts: sums [v_width], total weight [16] in lanes that sum
// to it, highest score [16] in each lane.
template <class K>
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
  void add(const float* part, const Sixteen& part_top) const {
    const Sixteen most = larger(load(top()), part_top);
    const Sixteen old = K::power(load(top()) - most), scale = K::power(part_top - most);
    for (int64_t d = 0; d < width + 16; d += 16) {
      const Sixteen sum = load(sums + d) * old;
      store(load(part + d) * scale + sum, sums + d);
    }
    store(most, top());
  }

  void finish(const Call& c, int64_t token, int64_t head) const {
    using Number = typename K::Number;
    float scale = 1, total = sum(load(sums + width));
    if (c.sinks) {
      const float sink = c.sinks[head] * kLog2e, most = std::max(*top(), sink);
      scale = first(K::power(all(*top() - most)));
      total = __builtin_fmaf(total, scale, first(K::power(all(sink - most))));
    }
    Number* out = static_cast<Number*>(c.out) + (token * c.q_heads + head) * c.v_dim;
    for (int64_t d = 0; d < c.v_dim; d += 16) {
      Number last[16];
      const bool whole = d + 16 <= c.v_dim;
      K::store(load(sums + d) * all(scale / total), whole ? out + d : last);
      if (!whole) std::copy(last, last + c.v_dim - d, out + d);
    }
  }
};

}  // namespace
