// Attention on a CPU for every kind of arithmetic: whole steps, over slots in place, in one call.
//
// A query's numbers depend on its own sequence alone, bit for bit: not on the batch, the threads or
// how a prompt was cut into segments. Keys are taken in parts of kPart tokens that begin at
// multiples of kPart. Each part has a softmax of its own, and its sums are added to those of the
// parts before (Flash-Decoding). A token that a query may not see adds an exact 0. So a query that
// is computed among others (a prompt's) and one alone (a decode) go through the same additions.
//
//   task    queries [tokens, group] that share key heads: of a prompt, or of decodes whose sequences
//           have a part in common, which is read once for all of them
//   part    K packed to columns of 16 tokens, V to columns of 16 of v_dim, in the arithmetic's order
//   panel   at most kPanel queries of one key head:
//             scores = Q . K, weights = 2^(scores - highest), sums = weights . V
//
// No byte behind a sequence's last token is read: there is no memory.

#pragma once

#include "softmax.h"

#include <atomic>

namespace {

constexpr int64_t kPart = 128;
constexpr int64_t kPanel = 32;
constexpr int64_t kScores = kPart + 16;    // strides of a panel's rows: no powers of 2
constexpr int64_t kWeights = kPart + 32;
constexpr int64_t kRowsOfTask = 192;       // queries: enough to be worth packing for
constexpr int64_t kPacked = 512 * 1024;    // bytes of packed heads that stay in the L2 cache

// c [rows, 16 * cols] = a [rows, k] . b, whose columns of 16 begin `step` apart. cols is even, k a
// multiple of 32. a and c have room for multiples of 16 rows.
template <class Packed>
struct ProductOf {
  const Packed* a;
  int64_t a_stride, rows;
  const Packed* b;
  int64_t step, cols, k;
  float* c;
  int64_t c_stride;
};

// --- an arithmetic ---
//
// struct K {
//   using Number;  // of queries, keys, values and results in memory
//   using Packed;  // of what is multiplied
//   static void multiply(int64_t level, const ProductOf<Packed>&);
//   static void put(const Number* query, Packed* to);  // 32 numbers
//   static void pack_keys(const Number* from, int64_t stride, Packed* to);    // 16 tokens x 32
//   static void pack_values(const Number* from, int64_t stride, Packed* to);  // 32 tokens x 16
//   static Sixteen power(const Sixteen& x);  // 2^x, exactly 1 of 0
//   static Sixteen weigh(...);        // see `weigh` of attention.cpp
//   static void store(Sixteen x, Number* to);
// };

// --- tasks ---

struct Task {
  int64_t segment, head, heads;  // whose keys, and key heads
  int64_t token, tokens;         // of the segment's queries; of decodes: 0, and how many
  int64_t begin, end;            // tokens that they attend to
  const int64_t* decodes;        // of a part: segments; of a prompt: null
  float* const* states;          // of each decode: [q_heads, state]
};

template <class K>
struct Shape {
  using Number = typename K::Number;
  using Packed = typename K::Packed;

  explicit Shape(const Call& call) : c(call) {}

  const Call& c;
  const int64_t group = c.q_heads / c.kv_heads;
  const int64_t k_width = round_up(c.k_dim, 32), v_width = round_up(c.v_dim, 32);
  const int64_t state = State<K>::size(v_width);
  const bool limited = c.window || c.chunk;

  // The first token that a query sees.
  int64_t begin(int64_t position) const {
    const int64_t window = c.window ? std::max<int64_t>(0, position - c.window + 1) : 0;
    return c.chunk ? std::max(window, position / c.chunk * c.chunk) : window;
  }
};

template <class K>
class Worker : Shape<K> {
  using Number = typename K::Number;
  using Packed = typename K::Packed;
  using Shape<K>::c, Shape<K>::group, Shape<K>::k_width, Shape<K>::v_width, Shape<K>::state;
  using Shape<K>::begin, Shape<K>::limited;

 public:
  explicit Worker(const Call& call) : Shape<K>(call) {}

  // Puts a segment's new token's keys and values of some heads into the slot.
  void write(int64_t segment, int64_t query, int64_t token, int64_t head, int64_t heads) const {
    for (int64_t h = head; h < head + heads; h++) {
      const auto* k = static_cast<const Number*>(c.new_keys) + query * c.new_key_stride[0] +
                      h * c.new_key_stride[1];
      const auto* v = static_cast<const Number*>(c.new_values) + query * c.new_value_stride[0] +
                      h * c.new_value_stride[1];
      std::copy(k, k + c.k_dim, const_cast<Number*>(key(segment, h, token)));
      std::copy(v, v + c.v_dim, const_cast<Number*>(value(segment, h, token)));
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
  Packed *queries, *keys, *values, *weights;
  Number* copy;
  float *scores, *sums, *own_states;

  void reserve(const Task& task, int64_t rows) {
    static thread_local Buffer<char> buffer;
    const int64_t space = round_up(rows, kPanel);
    const int64_t counts[] = {task.heads * space * k_width, task.heads * kPart * k_width,
                              task.heads * kPart * v_width, kPanel * kWeights};
    const int64_t floats[] = {kPanel * kScores, kPanel * (v_width + 16), task.heads * rows * state};
    const int64_t copied = kBlock * std::max(k_width, v_width) * sizeof(Number);
    int64_t bytes = copied;
    for (int64_t n : counts) bytes += n * sizeof(Packed);
    for (int64_t n : floats) bytes += n * sizeof(float);
    char* at = buffer.get(bytes);
    Packed** const packed[] = {&queries, &keys, &values, &weights};
    float** const single[] = {&scores, &sums, &own_states};
    for (int i = 0; i < 4; at += counts[i++] * sizeof(Packed))
      *packed[i] = reinterpret_cast<Packed*>(at);
    for (int i = 0; i < 3; at += floats[i++] * sizeof(float))
      *single[i] = reinterpret_cast<float*>(at);
    copy = reinterpret_cast<Number*>(at);
  }

  const Number* key(int64_t segment, int64_t head, int64_t token) const {
    return static_cast<const Number*>(c.keys) + c.slots[segment] * c.key_stride[0] +
           token * c.key_stride[1] + head * c.key_stride[2];
  }

  const Number* value(int64_t segment, int64_t head, int64_t token) const {
    return static_cast<const Number*>(c.values) + c.slots[segment] * c.value_stride[0] +
           token * c.value_stride[1] + head * c.value_stride[2];
  }

  State<K> state_of(const Task& task, int64_t h, int64_t row) const {
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

  void pack_queries(const Task& task, int64_t h, Packed* to) const {
    for (int64_t row = 0; row < task.tokens * group; row++, to += k_width) {
      const Number* from = static_cast<const Number*>(c.query) +
                           token_of(task, row) * c.query_stride[0] +
                           head_of(task, h, row) * c.query_stride[1];
      int64_t d = 0;
      for (; d + 32 <= c.k_dim; d += 32) K::put(from + d, to + d);
      if (d == c.k_dim) continue;
      Number last[32] = {};
      std::copy(from + d, from + c.k_dim, last);
      K::put(last, to + d);
    }
  }

  // A block of one head, of which `count` tokens are there: 0 beyond them and beyond `dim`.
  // Returns it, or a copy with the zeros, and sets the stride to match.
  const Number* whole(const Number* from, int64_t* stride, int64_t count, int64_t dim) const {
    if (count >= kBlock && dim % 32 == 0) return from;
    const int64_t width = round_up(dim, 32);
    for (int64_t t = 0; t < kBlock; t++) {
      Number* to = copy + t * width;
      if (t < count) std::copy(from + t * *stride, from + t * *stride + dim, to);
      std::fill(t < count ? to + dim : to, to + width, Number{});
    }
    *stride = width;
    return copy;
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
        const Number* k = whole(key(task.segment, task.head + h, t), &stride, task.end - t, c.k_dim);
        Packed* to = keys + (h * kPart + block * kBlock) * k_width;
        for (int64_t half = 0; half < 2; half++, k += 16 * stride)
          for (int64_t d = 0; d < k_width; d += 32, to += kTile) K::pack_keys(k + d, stride, to);
        stride = c.value_stride[1];
        const Number* v =
            whole(value(task.segment, task.head + h, t), &stride, task.end - t, c.v_dim);
        to = values + h * kPart * v_width + block * kTile;
        for (int64_t d = 0; d < v_width; d += 16, to += kPart / kBlock * kTile)
          K::pack_values(v + d, stride, to);
      }
    }
  }

  // Inlined: calls that only prefetch are dropped as if they did nothing.
  __attribute__((always_inline)) void prefetch(const Task& task, int64_t token) const {
    auto ask = [&](const Number* from, int64_t stride, int64_t dim) {
      for (int64_t h = 0; h < task.heads; h++, from += stride)
        for (int64_t d = 0; d < dim; d += 64 / sizeof(Number)) __builtin_prefetch(from + d, 0, 2);
    };
    for (const int64_t end = std::min(token + kBlock, task.end); token < end; token++) {
      ask(key(task.segment, task.head, token), c.key_stride[2], c.k_dim);
      ask(value(task.segment, task.head, token), c.value_stride[2], c.v_dim);
    }
  }

  // `rows` queries from `row` on, against one part of one head.
  void panel(const Task& task, int64_t base, int64_t h, int64_t row, int64_t rows,
             const Packed* query) {
    const int64_t first = position(task, row), last = position(task, row + rows - 1);
    const int64_t lowest = begin(first);
    const int64_t from = std::max<int64_t>(0, lowest - base) / kBlock * kBlock;
    const int64_t to = std::min(kPart, round_up(last + 1 - base, kBlock));
    if (from >= to) return;
    const Packed* k = keys + (h * kPart + from) * k_width;
    K::multiply(c.level, {query, k_width, rows, k, k_width * 16, (to - from) / 16, k_width,
                          scores + from, kScores});
    const int64_t width = v_width + 16;  // sums and total
    const Sixteen scale = all(c.softcap > 0 ? 1 : c.scale * kLog2e);
    Sixteen tops[kPanel];
    for (int64_t r = 0, end = first + 1 - base, left = group - row % group; r < rows; r++, left--) {
      if (!left) {
        left = group;
        end += !task.decodes;
      }
      float* score = scores + r * kScores;
      if (c.softcap > 0) cap_scores<K>(score, from, to, c.softcap * kLog2e, c.scale / c.softcap);
      const Sixteen most = highest(score, from, to, limited ? begin(base + end - 1) - base : from, end);
      tops[r] = larger(all(kLowest), most * scale);
    }
    for (int64_t r = 0; r < rows; r++) {
      const Sixteen total =
          K::weigh(scores + r * kScores, weights + r * kWeights, from, to, scale, tops[r]);
      store(total, sums + r * width + v_width);
    }
    const Packed* v = values + h * kPart * v_width + from / kBlock * kTile;
    K::multiply(c.level, {weights + from, kWeights, rows, v, kPart / kBlock * kTile, v_width / 16,
                          to - from, sums, width});
    for (int64_t r = 0; r < rows; r++)
      state_of(task, h, row + r).add(sums + r * width, tops[r]);
  }
};

// What is to be computed for a step, and the states of its decodes' parts.
template <class K>
class Step : Shape<K> {
  using Shape<K>::c, Shape<K>::group, Shape<K>::k_width, Shape<K>::v_width, Shape<K>::state;
  using Shape<K>::begin, Shape<K>::limited;

 public:
  explicit Step(const Call& call) : Shape<K>(call), firsts(c.n + 1) {
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
    for (const Task& t : tasks)
      products += t.tokens * (t.end - t.begin) * t.heads * group * (k_width + v_width);
  }

  std::vector<Task> tasks;
  int64_t products = 0;  // of numbers, about

  bool is_decode(int64_t segment) const { return c.starts[segment + 1] - c.starts[segment] == 1; }

  // Adds up the parts of one query.
  void finish(int64_t segment, int64_t head) const {
    const State<K> sum = part(firsts[segment], head);
    for (int64_t p = firsts[segment] + 1; p < firsts[segment + 1]; p++)
      sum.add(part(p, head).sums, load(part(p, head).top()));
    sum.finish(c, c.starts[segment], head);
  }

 private:
  std::vector<int64_t> firsts;  // the first part of each segment, of all decodes'
  float* states;                // [parts, q_heads, state]
  std::vector<int64_t> decodes;
  std::vector<float*> places;

  State<K> part(int64_t number, int64_t head) const {
    return {states + (number * c.q_heads + head) * state, v_width};
  }

  void take(int64_t segment, int64_t number) {
    decodes.push_back(segment);
    places.push_back(part(firsts[segment] + number, 0).sums);
  }

  // A part [from, to) of the decodes that were taken last.
  void add(int64_t count, int64_t from, int64_t to) {
    const auto at = int64_t(decodes.size()) - count;
    const int64_t fit = std::min(kPacked / (kPart * (k_width + v_width) * int64_t(sizeof(typename K::Packed))),
                                 count > 1 ? kRowsOfTask / (count * group) : c.kv_heads);
    for (int64_t head = 0, heads; head < c.kv_heads; head += heads) {
      heads = std::min(c.kv_heads - head, std::max<int64_t>(1, fit));
      tasks.push_back({decodes[at], head, heads, 0, count, from, to, &decodes[at], &places[at]});
    }
  }

  void add_shared() {
    const int64_t most = std::max<int64_t>(1, kRowsOfTask / group);
    for (int64_t i = 0; i < (limited ? 0 : c.n_shared); i++) {
      const int64_t number = c.shared_part[i], end = c.shared_starts[i + 1];
      for (int64_t at = c.shared_starts[i], count; at < end; at += count) {
        count = std::min(most, end - at);
        for (int64_t m = at; m < at + count; m++) take(c.shared_members[m], number);
        add(count, number * kPart, (number + 1) * kPart);
      }
    }
  }

  void add_prompt(int64_t segment) {
    const int64_t tokens = std::max<int64_t>(1, kRowsOfTask / group);
    const int64_t length = c.starts[segment + 1] - c.starts[segment];
    for (int64_t token = (length - 1) / tokens * tokens; token >= 0; token -= tokens) {
      const int64_t count = std::min(tokens, length - token);
      const int64_t first = c.ends[segment] - length + token;
      for (int64_t head = 0; head < c.kv_heads; head++)
        tasks.push_back({segment, head, 1, token, count, begin(first), first + count,
                         nullptr, nullptr});
    }
  }

  void add_own(int64_t segment) {
    const int64_t end = c.ends[segment];
    const int64_t skipped = limited || !c.n_shared ? 0 : c.own_part[segment];
    int64_t from = std::max(begin(end - 1), skipped * kPart);
    for (int64_t p = skipped; p < firsts[segment + 1] - firsts[segment]; p++) {
      const int64_t to = std::min(end, (from / kPart + 1) * kPart);
      take(segment, p);
      add(1, from, to);
      from = to;
    }
  }
};

template <class K>
void attend(const Call& c) {
  const Step<K> step(c);
  const auto num_tasks = int64_t(step.tasks.size());
  std::atomic<int64_t> taken{0};
#pragma omp parallel num_threads(threads_for(step.products, c.threads))
  {
    Worker<K> worker(c);
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

}  // namespace

extern "C" int64_t batchrun_part() { return kPart; }

#define ATTENTION(K, name) \
  extern "C" void batchrun_attend_##name(const Call& c) { attend<K>(c); }
