// The forward pass of a decoder, for writing on a processor: what lean.py computes, in one call.
//
// A token costs little arithmetic and many small operations, which an interpreter starts one by
// one; here they are loops. Every token is computed by the same operations in the same order
// whatever else is in the call, so that its logits are the same bits in any company.
//
// A call takes tokens of any rows side by side, a row's own in their order. The residual stream is
// float32; the cache is of type C, float or Bfloat16, the inputs of products of type T, and the
// matrices as products.h says: both are C, or of whole numbers, whose sums are exact.

#include <cmath>
#include <vector>

#include "products.h"

namespace {

inline float squares(const float* x, int64_t width) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < width; i++) sum += x[i] * x[i];
  return sum;
}

// factor x, as whole numbers of the length LONGEST. The scale tells of numbers that are none.
void whole(const float* x, float factor, int64_t width, Inputs<Fixed> to) {
  const float length = std::sqrt(squares(x, width)), stretch = length > 0 ? LONGEST / length : 0;
  for (int64_t i = 0; i < width; i++) put(x[i] * stretch, to.rows[i]);
  to.scales->factor = factor * length / LONGEST;
}

// The same, span by span, up to 127.
void whole(const float* x, float factor, int64_t width, Inputs<Small> to) {
  for (int64_t from = 0; from < width; from += SPAN, to.scales++) {
    const int64_t end = std::min(from + SPAN, width);
    uint32_t most = 0;  // as bits, for those of what is no number are more than all others
#pragma omp simd reduction(max : most)
    for (int64_t i = from; i < end; i++) most = std::max(most, same_bits<uint32_t>(x[i]) & 0x7fffffff);
    const float top = same_bits<float>(most), stretch = top > 0 ? 127 / top : 0;
    std::int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = from; i < end; i++) {
      put(x[i] * stretch, to.rows[i]);
      sum += to.rows[i].value;
    }
    *to.scales = {factor * top / 127, -128 * sum};
  }
  for (int64_t i = width; i % IN_WORD<Small>; i++) to.rows[i].value = 0;
}

// x / sqrt(sum x^2 + d eps); the rest of RMSNorm is in the matrix behind it.
template <class T>
void normalised(const float* x, int64_t width, float eps, Inputs<T> to) {
  const float factor = 1 / std::sqrt(squares(x, width) + eps * eps);
  if constexpr (is_whole<T>) whole(x, factor, width, to);
  else
    for (int64_t i = 0; i < width; i++) put(x[i] * factor, to.rows[i]);
}

// SwiGLU: silu(gate) * up.
template <class T>
void gated(const float* gate, const float* up, int64_t width, T* to) {
  for (int64_t i = 0; i < width; i++) put(gate[i] / (1 + exponential(-gate[i])) * up[i], to[i]);
}

// Normalise, if the model does, and rotate a query or a key, in place.
void turned(float* head, int64_t width, const float* norm, float eps, const float* cos,
            const float* sin) {
  if (norm) {
    const float factor = 1 / std::sqrt(squares(head, width) + eps * eps);
    for (int64_t i = 0; i < width; i++) head[i] *= norm[i] * factor;
  }
  float *first = head, *second = head + width / 2;
#pragma omp simd
  for (int64_t i = 0; i < width / 2; i++) {
    float a = first[i], b = second[i];
    first[i] = a * cos[i] - b * sin[i];
    second[i] = b * cos[i] + a * sin[i];
  }
}

// Have some numbers brought from memory while something else is computed.
template <int COUNT, class T>
inline void fetch(const T* from) {
  for (int i = 0; i < COUNT; i += 64 / int(sizeof(T))) __builtin_prefetch(from + i, 0, 2);
}

// exp(score - highest), in place, and their sum.
float softened(float* scores, int64_t count) {
  float top = scores[0], whole = 0;
#pragma omp simd reduction(max : top)
  for (int64_t c = 0; c < count; c++) top = std::max(top, scores[c]);
#pragma omp simd reduction(+ : whole)
  for (int64_t c = 0; c < count; c++) whole += scores[c] = exponential(scores[c] - top);
  return whole;
}

// Attention of one query, over the columns that it sees: softmax(q K' / sqrt(E)) V.
// E is the width of a head; `next` are the keys that will be read next. The scores are a thread's
// own, with room for a number for every column and a head more. What is written may be q itself.
template <int E, class T, class To>
void attend(const float* q, const T* keys, const T* values, const T* next, int64_t seen,
            float* scores, To* to) {
  T query[E];
  for (int i = 0; i < E; i++) put(q[i] / std::sqrt(float(E)), query[i]);
  for (int64_t c = 0; c < seen; c++) {
    Lanes sum = {};
#pragma GCC unroll 16
    for (int i = 0; i < E; i += 4 * LANES / int(sizeof(T)))
      sum = fused<T>(sum, load<Words>(query + i), load<Words>(keys + c * E + i));
    fetch<E>(values + c * E);
    scores[c] = total(sum);
  }
  const float whole = softened(scores, seen);
  Lanes mixed[E / LANES] = {};
  for (int64_t c = 0; c < seen; c++) {
#pragma GCC unroll 16
    for (int v = 0; v < E / LANES; v++)
      mixed[v] += scores[c] * lanes(values + c * E + v * LANES);
    fetch<E>(next + c * E);
  }
#pragma GCC unroll 16
  for (int v = 0; v < E / LANES; v++) {
    Lanes share = mixed[v] / whole;
    for (int i = 0; i < LANES; i++) put(share[i], to[v * LANES + i]);
  }
}

// The same for any E.
template <class T, class To>
void attend(const float* q, const T* keys, const T* values, int64_t seen, int64_t e, float* scores,
            To* to) {
  const float scale = 1 / std::sqrt(float(e));
  for (int64_t c = 0; c < seen; c++) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < e; i++) sum += q[i] * widened(keys[c * e + i]);
    scores[c] = sum * scale;
  }
  const float whole = softened(scores, seen);
  float* mixed = scores + seen;
  std::fill(mixed, mixed + e, 0.0f);
  for (int64_t c = 0; c < seen; c++)
#pragma omp simd
    for (int64_t i = 0; i < e; i++) mixed[i] += scores[c] * widened(values[c * e + i]);
  for (int64_t i = 0; i < e; i++) put(mixed[i] / whole, to[i]);
}

// The model -------------------------------------------------------------------------------------

struct Layer {
  Matrix into_heads, out_of_heads, widen, narrow;
  const float* head_norm;
};

struct Model {
  const Layer* layers;
  Matrix head;
  const float *cos, *sin;
  int64_t depth, hidden, inner, heads, kv_heads, width;
  float eps, head_eps;
};

// Keys and values of all rows (depth, 2, rows, kv_heads, columns, width).
struct Store {
  void* start;
  int64_t rows, columns;
};

template <class C, class T>
struct Call {
  const Model& m;
  const Store& store;
  int64_t count;          // tokens
  const int64_t* rows;    // of each token
  const int64_t* places;  // of each token in its row
  const int64_t* wanted;  // tokens whose logits are asked for, strictly rising, by their number
                          // in the whole call
  int64_t number, first;  // how many; this chunk's first token
  float* x;               // (count, hidden)
  Inputs<T> in;           // of products
  float* wide;            // outputs of products
  float* scores;          // of one thread

  C* cached(int64_t layer, int64_t part, int64_t row, int64_t head) const {
    int64_t stretch = ((layer * 2 + part) * store.rows + row) * m.kv_heads + head;
    return static_cast<C*>(store.start) + stretch * store.columns * m.width;
  }

  // The i-th of the tokens, where `kept` of them are left: all, or those that are wanted.
  int64_t which(int64_t i, int64_t kept) const { return kept == count ? i : wanted[i] - first; }

  void normalise(int64_t kept) const {
#pragma omp for schedule(static)
    for (int64_t t = 0; t < kept; t++)
      normalised(x + t * m.hidden, m.hidden, m.eps, in.from(t, m.hidden));
  }

  // Rotate queries and keys; keys and values go into the cache.
  void turn(int64_t layer) const {
    const int64_t all = m.heads + 2 * m.kv_heads, rotated = m.heads + m.kv_heads;
    const float* norm = m.layers[layer].head_norm;
#pragma omp for schedule(static)
    for (int64_t each = 0; each < count * all; each++) {
      int64_t t = each / all, h = each % all, place = places[t];
      float* head = wide + each * m.width;
      if (h < rotated)
        turned(head, m.width, norm ? norm + h * m.width : nullptr, m.head_eps,
               m.cos + place * (m.width / 2), m.sin + place * (m.width / 2));
      if (h < m.heads) continue;
      int64_t own = (h - m.heads) % m.kv_heads;
      C* to = cached(layer, h >= rotated, rows[t], own) + place * m.width;
      for (int64_t i = 0; i < m.width; i++) put(head[i], to[i]);
    }
  }

  // Of all tokens; in the last layer, of those whose logits are asked for, side by side. Where all
  // heads of a token have to be there before they are inputs, they take the places of their queries.
  void attention(int64_t layer, int64_t kept) const {
    const int64_t all = m.heads + 2 * m.kv_heads, group = m.heads / m.kv_heads;
#pragma omp for schedule(static)
    for (int64_t each = 0; each < kept * m.kv_heads; each++) {
      const int64_t i = each / m.kv_heads, t = which(i, kept), own = each % m.kv_heads;
      const C* keys = cached(layer, 0, rows[t], own);
      const C* values = cached(layer, 1, rows[t], own);
      const int64_t later = std::min(each + 1, kept * m.kv_heads - 1);
      const C* next = cached(layer, 0, rows[which(later / m.kv_heads, kept)], later % m.kv_heads);
      for (int64_t h = own * group; h < (own + 1) * group; h++) {
        float* q = wide + (t * all + h) * m.width;
        const int64_t seen = places[t] + 1;
        auto write = [&](auto* to) {
          if (m.width == 32) attend<32>(q, keys, values, next, seen, scores, to);
          else if (m.width == 64) attend<64>(q, keys, values, next, seen, scores, to);
          else if (m.width == 128) attend<128>(q, keys, values, next, seen, scores, to);
          else attend(q, keys, values, seen, m.width, scores, to);
        };
        if constexpr (is_whole<T>) write(q);
        else write(in.rows + (i * m.heads + h) * m.width);
      }
    }
    if constexpr (is_whole<T>) {
      const int64_t width = m.heads * m.width;
#pragma omp for schedule(static)
      for (int64_t i = 0; i < kept; i++)
        whole(wide + which(i, kept) * all * m.width, 1, width, in.from(i, width));
    }
  }

  // The residual stream of the tokens that are left, side by side.
  void keep(int64_t kept) const {
    if (kept == count) return;
#pragma omp single
    for (int64_t i = 0; i < kept; i++)
      if (which(i, kept) > i) std::copy_n(x + which(i, kept) * m.hidden, m.hidden, x + i * m.hidden);
  }

  void gate(int64_t kept) const {
#pragma omp for schedule(static)
    for (int64_t t = 0; t < kept; t++) {
      float* from = wide + t * 2 * m.inner;
      if constexpr (is_whole<T>) {
        gated(from, from + m.inner, m.inner, from);
        whole(from, 1, m.inner, in.from(t, m.inner));
      } else {
        gated(from, from + m.inner, m.inner, in.rows + t * m.inner);
      }
    }
  }

  // Called by all threads, as everything above; each part ends with their waiting for each other.
  // Of the last layer, later tokens need the keys and values only.
  void run(float* logits) const {
    for (int64_t i = 0; i < m.depth; i++) {
      const Layer& layer = m.layers[i];
      const int64_t kept = i + 1 == m.depth ? number : count;
      normalise(count);
      product<T>(layer.into_heads, in, wide, count);
      turn(i);
      attention(i, kept);
      keep(kept);
      product<T>(layer.out_of_heads, in, x, kept, true);
      normalise(kept);
      product<T>(layer.widen, in, wide, kept);
      gate(kept);
      product<T>(layer.narrow, in, x, kept, true);
    }
    normalise(number);
    product<T>(m.head, in, logits, number);
  }
};

constexpr int64_t AT_ONCE = 256;  // tokens: their numbers stay in a processor's cache

// Tokens of rows, at their places; `wanted` are those whose logits are asked for, by rising number.
template <class C, class T>
void forward(const Model& m, const Store& store, int64_t count, const int64_t* rows,
             const int64_t* places, float* x, const int64_t* wanted, int64_t number, float* logits,
             int threads) {
  const int64_t most = std::min(count, AT_ONCE);
  const int64_t heads = (m.heads + 2 * m.kv_heads) * m.width;
  const int64_t widest_in = std::max({m.hidden, m.heads * m.width, m.inner});
  thread_local std::vector<T> in;
  thread_local std::vector<Scale> scales;
  thread_local std::vector<float> wide;
  in.resize(std::max<size_t>(in.size(), most * words<T>(widest_in) * IN_WORD<T>));
  wide.resize(std::max<size_t>(wide.size(), most * std::max(heads, 2 * m.inner)));
  scales.resize(std::max<size_t>(scales.size(), most * Inputs<T>::scales_of(widest_in)));
  const Inputs<T> inputs{in.data(), scales.data()};
  float* wide_start = wide.data();
#pragma omp parallel num_threads(threads)
  {
    thread_local std::vector<float> scores;
    scores.resize(std::max<size_t>(scores.size(), store.columns + m.width));
    int64_t named = 0;
    for (int64_t from = 0; from < count; from += AT_ONCE) {
      int64_t to = std::min(from + AT_ONCE, count), end = named;
      while (end < number && wanted[end] < to) end++;
      Call<C, T> call{m, store, to - from, rows + from, places + from, wanted + named,
                      end - named, from, x + from * m.hidden, inputs, wide_start, scores.data()};
      call.run(logits + named * m.head.outputs);
      named = end;
    }
  }
}

}  // namespace

extern "C" {

int64_t panel_width() { return PANEL; }
int64_t whole_in_word() { return IN_WORD<Whole>; }

#define FORWARD(NAME, C, T)                                                                     \
  void NAME(const Model* m, const Store* store, int64_t count, const int64_t* rows,              \
            const int64_t* places, float* x, const int64_t* wanted, int64_t number,              \
            float* logits, int threads) {                                                        \
    forward<C, T>(*m, *store, count, rows, places, x, wanted, number, logits, threads);       \
  }

FORWARD(forward_float32, float, float)
FORWARD(forward_bfloat16, Bfloat16, Bfloat16)
FORWARD(forward_int8, Bfloat16, Whole)
}
