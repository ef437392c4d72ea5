// Draws tokens from rows of logits on a CPU.
//
// A token's weight is exp(logit - highest) as a whole number of 2^-44: sums of whole numbers are
// exact in whatever order, so neither vectors nor threads nor the batch change a draw; 64 bits hold
// those of half a million tokens. No product is fused with a sum, so that numpy gets the same
// weights where there is no compiler (sampling.py).
//
// Top-k, top-p and min-p all keep the logits that reach some limit. It is found by bisection
// between the lowest and the highest logit that it can be: each round reads only what the former
// one has left, soon some hundred of a vocabulary.

#ifndef __clang__
// Without traps a choice between two numbers is no branch, and AVX2 has it too.
#pragma GCC optimize("fp-contract=off", "no-trapping-math")
#endif

#include "common.h"

#ifdef __clang__
#pragma STDC FP_CONTRACT OFF
#endif

namespace {

constexpr int64_t kBlock = 256;
constexpr int64_t kWork = 8;  // a logit takes as long as so many products
constexpr float kInfinity = __builtin_inff();
constexpr float kLowest = -30.5f;  // below the highest: what weighs nothing

// exp(x) * 2^44 for x <= 0, to float32's precision.
inline float weight(float x) {
  x = x > -40.0f ? x : -40.0f;  // NaN too
  const float power = x * 1.44269504f;
  const float whole = power + 12582912.0f - 12582912.0f, part = power - whole;  // to the nearest
  float p = 1.5403530e-4f;  // 2^part by its Taylor series
  for (float c : {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f})
    p = p * part + c;
  const int32_t bits = (int32_t(whole) + 127 + 44) << 23;
  float scale;
  std::memcpy(&scale, &bits, 4);
  return p * scale;
}

// The first `n` of a block's weights, 0 where x is below the limit.
inline void weigh(const float* x, int64_t n, float highest, float limit, float* to) {
  for (int64_t i = 0; i < n; i++) to[i] = x[i] >= limit ? weight(x[i] - highest) : 0.0f;
}

int64_t count(const float* x, int64_t n, float limit) {
  int64_t found = 0;
  for (int64_t at = 0; at < n; at += kBlock) {
    int32_t of_block = 0;
    for (int64_t i = at; i < std::min(n, at + kBlock); i++) of_block += x[i] >= limit;
    found += of_block;
  }
  return found;
}

int64_t mass_of_block(const float* x, int64_t n, float highest, float limit) {
  if (!count(x, n, limit)) return 0;
  float weights[kBlock];
  weigh(x, n, highest, limit, weights);
  int64_t sum = 0;
  for (int64_t i = 0; i < n; i++) sum += int64_t(weights[i]);
  return sum;
}

int64_t mass(const float* x, int64_t n, float highest, float limit) {
  int64_t sum = 0;
  for (int64_t at = 0; at < n; at += kBlock)
    sum += mass_of_block(x + at, std::min(kBlock, n - at), highest, limit);
  return sum;
}

// Copies the numbers in [from, to) to `left`, which may be `x`; returns how many there are.
int64_t keep(const float* x, int64_t n, float from, float to, float* left) {
  int64_t kept = 0, i = 0;
#ifdef __AVX512F__
  for (; i + 16 <= n; i += 16) {
    const __m512 values = _mm512_loadu_ps(x + i);
    const __mmask16 reach = _mm512_cmp_ps_mask(values, _mm512_set1_ps(from), _CMP_GE_OQ);
    const __mmask16 chosen =
        _mm512_mask_cmp_ps_mask(reach, values, _mm512_set1_ps(to), _CMP_LT_OQ);
    _mm512_storeu_ps(left + kept, _mm512_maskz_compress_ps(chosen, values));
    kept += __builtin_popcount(chosen);
  }
#endif
  for (; i < n; i++) {
    const float value = x[i];
    left[kept] = value;
    kept += (value >= from) & (value < to);
  }
  return kept;
}

// The highest value from `low` to `high` that `measure(x, n, value)`, which grows with every number
// that reaches the value, finds to be `need` or more; `low` if there is none.
template <class Measure>
float reaching(const float* x, int64_t n, float low, float high, int64_t need, Measure measure,
               float* left) {
  while (n && low < high) {
    float middle = low + (high - low) / 2;
    if (!(middle > low)) middle = high;
    const int64_t above = measure(x, n, middle);
    const bool enough = above >= need;
    if (!enough) need -= above;
    const float from = enough ? middle : low, to = enough ? kInfinity : middle;
    n = keep(x, n, from, to, left);
    x = left;
    float least = kInfinity, most = low;
#pragma omp simd reduction(min : least) reduction(max : most)
    for (int64_t i = 0; i < n; i++) {
      least = left[i] < least ? left[i] : least;
      most = left[i] > most ? left[i] : most;
    }
    if (n) low = least, high = most;
  }
  return low;
}

struct Filters {
  double top_p;
  float log_min_p;
  int64_t top_k;
};

// What a thread keeps from call to call: two numbers for each logit, one for each block.
struct Memory {
  std::vector<float> x, left;
  std::vector<int64_t> masses;

  void resize(int64_t n) {
    if (x.size() >= size_t(n)) return;
    x.resize(n);
    left.resize(n);
    masses.resize(n / kBlock + 1);
  }
};

// Logits over their temperature; returns the highest, NaN where a logit is NaN or infinity.
template <class T>
float scaled(const T* logits, int64_t n, float temperature, float* x) {
  float highest = -kInfinity;
  int32_t invalid = 0;
#pragma omp simd reduction(max : highest) reduction(| : invalid)
  for (int64_t i = 0; i < n; i++) {
    const float logit = widen(logits[i]);
    invalid |= !(logit < kInfinity);
    x[i] = logit / temperature;
    highest = x[i] > highest ? x[i] : highest;
  }
  return invalid ? __builtin_nanf("") : highest;
}

// The first of the highest logits; -1 where none is finite.
template <class T>
int64_t most_likely(const T* logits, int64_t n) {
  float highest = -kInfinity;
  int64_t found = -1;
  for (int64_t i = 0; i < n; i++)
    if (widen(logits[i]) > highest) highest = widen(logits[i]), found = i;
  return found;
}

float lowest_kept(const float* x, int64_t n, float highest, const Filters& f, float* left) {
  float limit = highest + kLowest;
  if (f.top_k < n) limit = reaching(x, n, limit, highest, f.top_k, count, left);
  if (f.top_p < 1) {
    const auto measure = [&](const float* y, int64_t m, float value) {
      return mass(y, m, highest, value);
    };
    const int64_t total = measure(x, n, limit);
    const auto need = std::min(total, int64_t(std::ceil(f.top_p * double(total))));
    limit = reaching(x, n, limit, highest, need, measure, left);
  }
  return std::max(limit, highest + f.log_min_p);
}

// Inverts the distribution at `at`, in [0, 1).
int64_t draw(const float* x, int64_t n, float highest, float limit, double at, int64_t* masses) {
  int64_t total = 0;
  for (int64_t i = 0; i < n; i += kBlock)
    total += masses[i / kBlock] = mass_of_block(x + i, std::min(kBlock, n - i), highest, limit);
  int64_t ahead = std::min(int64_t(at * double(total)), total - 1), block = 0;
  while (ahead >= masses[block]) ahead -= masses[block++];
  float weights[kBlock];
  const int64_t begin = block * kBlock;
  weigh(x + begin, std::min(kBlock, n - begin), highest, limit, weights);
  int64_t i = 0;
  while (ahead >= int64_t(weights[i])) ahead -= int64_t(weights[i++]);
  return begin + i;
}

// body(row, x, highest, memory) for each row of bfloat16 or float32, with its logits over their
// temperature.
template <class Temperature, class Body>
void each(const void* logits, bool bfloat16, int64_t rows, int64_t n, int64_t threads,
          Temperature temperature, Body body) {
#pragma omp parallel num_threads(threads_for(rows * n * kWork, threads))
  {
    static thread_local Memory memory;
    memory.resize(n);
    float* x = memory.x.data();
#pragma omp for schedule(dynamic)
    for (int64_t row = 0; row < rows; row++) {
      const float over = temperature(row);
      const float highest =
          bfloat16 ? scaled(static_cast<const uint16_t*>(logits) + row * n, n, over, x)
                   : scaled(static_cast<const float*>(logits) + row * n, n, over, x);
      body(row, x, highest, memory);
    }
  }
}

}  // namespace

// Each row's columns: a number in [0, 1), temperature, top_p, log(min_p), top_k.
extern "C" void batchrun_draw(const void* logits, int bfloat16, int64_t rows, int64_t n,
                              const double* columns, int64_t* tokens, int64_t threads) {
  each(logits, bfloat16, rows, n, threads, [&](int64_t row) { return float(columns[row * 5 + 1]); },
       [&](int64_t row, const float* x, float highest, Memory& memory) {
         const double* c = columns + row * 5;
         const Filters filters = {c[2], float(c[3]), int64_t(c[4])};
         if (std::isfinite(highest)) {
           const float limit = lowest_kept(x, n, highest, filters, memory.left.data());
           tokens[row] = draw(x, n, highest, limit, c[0], memory.masses.data());
         } else if (std::isnan(highest)) {
           tokens[row] = -1;
         } else if (bfloat16) {  // the temperature is so low that float32 does not reach
           tokens[row] = most_likely(static_cast<const uint16_t*>(logits) + row * n, n);
         } else {
           tokens[row] = most_likely(static_cast<const float*>(logits) + row * n, n);
         }
       });
}

// The logarithm of each row's sum of exponentials.
extern "C" void batchrun_logsumexp(const void* logits, int bfloat16, int64_t rows, int64_t n,
                                   float* out, int64_t threads) {
  each(logits, bfloat16, rows, n, threads, [](int64_t) { return 1.0f; },
       [&](int64_t row, const float* x, float highest, Memory&) {
         const double sum = double(mass(x, n, highest, highest + kLowest));
         out[row] = float(highest + std::log(std::ldexp(sum, -44)));
       });
}

#ifdef __AVX512F__
// The first of the highest of each row [rows, n]; -1 where that is infinite or one is NaN.
extern "C" void batchrun_argmax(const uint16_t* x, int64_t rows, int64_t n, int64_t* found,
                                int64_t threads) {
#pragma omp parallel for num_threads(threads_for(rows * n, threads)) schedule(static)
  for (int64_t row = 0; row < rows; row++) {
    __m512 highest = _mm512_set1_ps(-__builtin_inff());
    __m512i places = _mm512_setzero_si512();
    __mmask16 nan = 0;
    for (int64_t i = 0; i < n; i += 16) {
      uint16_t last[16];
      const uint16_t* from = x + row * n + i;
      if (i + 16 > n) {
        std::fill(last, last + 16, uint16_t(0xff80));  // -inf
        std::copy(from, from + n - i, last);
        from = last;
      }
      const __m512 values = widen(from);
      const __mmask16 higher = _mm512_cmp_ps_mask(values, highest, _CMP_GT_OQ);
      nan |= _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
      highest = _mm512_mask_mov_ps(highest, higher, values);
      const __m512i at = _mm512_add_epi32(lanes(), _mm512_set1_epi32(i));
      places = _mm512_mask_mov_epi32(places, higher, at);
    }
    const float top = _mm512_reduce_max_ps(highest);
    const __m512 most = _mm512_set1_ps(top);
    const __mmask16 reach = _mm512_cmp_ps_mask(highest, most, _CMP_EQ_OQ);
    found[row] = nan || !std::isfinite(top) ? -1 : _mm512_mask_reduce_min_epi32(reach, places);
  }
}
#endif

// On some of the rows; penalties: repetition, presence and frequency, `count` of each.
extern "C" void batchrun_penalise(float* logits, int64_t n, int64_t count, const int64_t* rows,
                                  const int64_t* slots, const float* penalties,
                                  const int32_t* counts, const uint8_t* prompt, int64_t threads) {
#pragma omp parallel for num_threads(threads_for(count * n, threads)) schedule(static)
  for (int64_t i = 0; i < count; i++) {
    float* x = logits + rows[i] * n;
    const int32_t* times = counts + slots[i] * n;
    const uint8_t* prompted = prompt + slots[i] * n;
    const float repetition = penalties[i], presence = penalties[count + i];
    const float frequency = penalties[2 * count + i];
    for (int64_t j = 0; j < n; j++) {
      const float less = x[j] * repetition, smaller = x[j] / repetition;
      const float repeated = x[j] < 0 ? less : smaller;
      const float once = times[j] > 0 ? presence : 0.0f;
      const float value = (times[j] > 0) | prompted[j] ? repeated : x[j];
      x[j] = value - (once + frequency * float(times[j]));
    }
  }
}

namespace {

// Leaves a row only the tokens whose bit is set; if all of these are `least`, they get `zero`.
template <class T>
void keep(T* x, int64_t n, const uint32_t* bits, int64_t words, T least, T zero) {
  bool alive = false;
  for (int64_t at = 0; at < n; at += 32) {
    const uint32_t word = at / 32 < words ? bits[at / 32] : 0;
    const int64_t end = std::min(n, at + 32);
    if (!word) {
      std::fill(x + at, x + end, least);
    } else {
      for (int64_t i = at; i < end; i++) {
        if (!(word >> (i - at) & 1)) x[i] = least;
        alive |= x[i] != least;
      }
    }
  }
  if (alive) return;
  for (int64_t i = 0; i < std::min(n, words * 32); i++)
    if (bits[i / 32] >> (i % 32) & 1) x[i] = zero;
}

}  // namespace

// Sets what a mask [count, words] leaves out to -inf, in some of the rows.
extern "C" void batchrun_mask(void* logits, int bfloat16, int64_t n, int64_t count,
                              const int64_t* rows, const uint32_t* bits, int64_t words,
                              int64_t threads) {
#pragma omp parallel for num_threads(threads_for(count * n, threads)) schedule(static)
  for (int64_t i = 0; i < count; i++) {
    const uint32_t* own = bits + i * words;
    if (bfloat16)
      keep<uint16_t>(static_cast<uint16_t*>(logits) + rows[i] * n, n, own, words, 0xff80, 0);
    else
      keep<float>(static_cast<float*>(logits) + rows[i] * n, n, own, words, -kInfinity, 0.0f);
  }
}
