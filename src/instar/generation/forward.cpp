// The forward pass of a decoder, for writing on a processor: what lean.py computes, in one call.
//
// A token costs little arithmetic and many small operations, which an interpreter starts one by
// one; here they are loops. Every token is computed by the same operations in the same order
// whatever else is in the call, so that its logits are the same bits in any company.
//
// A call takes tokens of any rows side by side, at least the rows' own in order. The residual
// stream is float32; the inputs of products, the matrices and the cache are of type T, float or
// Bfloat16, and sums are float32.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

using std::int64_t;
using std::uint32_t;

namespace {

// Numbers ---------------------------------------------------------------------------------------

struct Bfloat16 {
  std::uint16_t bits;
};

template <class To, class From>
inline To same_bits(From from) {
  To to;
  static_assert(sizeof to == sizeof from);
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline float widened(float x) { return x; }
inline float widened(Bfloat16 x) { return same_bits<float>(uint32_t(x.bits) << 16); }

inline void put(float x, float& to) { to = x; }

// To the nearest, ties to even; a NaN stays one.
inline void put(float x, Bfloat16& to) {
  uint32_t bits = same_bits<uint32_t>(x);
  uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  to.bits = std::uint16_t(x != x ? 0x7fc0 : rounded);
}

// exp(x) = 2^n exp(r), |r| <= log(2) / 2, with the minimax polynomial of Cephes' expf: error 1e-7.
inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
  const float shift = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to an integer
  float n = (x * 1.44269504f + shift) - shift;
  float r = x - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * same_bits<float>((int32_t(n) + 127) << 23);
}

// Vectors: as many numbers as a register holds ----------------------------------------------------

#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif

typedef float Lanes __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef std::uint16_t Halves __attribute__((vector_size(2 * LANES)));

template <class V>
inline V load(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

inline Lanes lanes(const float* from) { return load<Lanes>(from); }
inline Lanes lanes(const Bfloat16* from) {
  return same_bits<Lanes>(__builtin_convertvector(load<Halves>(from), Words) << 16);
}

// Products are made of words of 32 bits: one float, or two neighbouring bfloat16.
template <class T>
constexpr int64_t words(int64_t numbers) {
  return numbers * int64_t(sizeof(T)) / 4;
}

// sum + a b, of each pair of words.
template <class T>
inline Lanes fused(Lanes sum, Words a, Words b);

template <>
inline Lanes fused<float>(Lanes sum, Words a, Words b) {
  return sum + same_bits<Lanes>(a) * same_bits<Lanes>(b);
}

template <>
inline Lanes fused<Bfloat16>(Lanes sum, Words a, Words b) {
#ifdef __AVX512BF16__
  return same_bits<Lanes>(_mm512_dpbf16_ps(same_bits<__m512>(sum), same_bits<__m512bh>(a),
                                           same_bits<__m512bh>(b)));
#else
  sum += same_bits<Lanes>(a << 16) * same_bits<Lanes>(b << 16);
  return sum + same_bits<Lanes>(a & 0xffff0000u) * same_bits<Lanes>(b & 0xffff0000u);
#endif
}

inline float total(Lanes v) {
#ifdef __AVX512F__
  return _mm512_reduce_add_ps(same_bits<__m512>(v));
#else
  float sum = 0;
  for (int i = 0; i < LANES; i++) sum += v[i];
  return sum;
#endif
}

// Products --------------------------------------------------------------------------------------

// A matrix lies in panels of PANEL outputs; in a panel, the first word of every output comes first.
constexpr int PANEL = 2 * LANES;
// Rows that are multiplied together: as many as there are registers for their sums.
constexpr int TILE = LANES == 16 ? 12 : 6;


struct Matrix {
  const uint32_t* panels;
  const float* bias;
  int64_t inputs, outputs;
};

// Part of a row of a product: y = sum + bias, or that added onto y.
void finish(const float* sum, int64_t count, const float* bias, float* y, bool onto) {
  for (int64_t i = 0; i < count; i++) y[i] = sum[i] + (bias ? bias[i] : 0) + (onto ? y[i] : 0);
}

// ROWS rows times one panel: y = x W' + b, or that added onto y.
template <class T, int ROWS>
void tile(const Matrix& m, int64_t panel, const T* in_, float* y, bool onto) {
  const int64_t count = words<T>(m.inputs), first = panel * PANEL;
  const uint32_t* w = m.panels + panel * count * PANEL;
  const uint32_t* in = reinterpret_cast<const uint32_t*>(in_);
  // Loops over these are unrolled, and no address is taken, so that they stay in registers.
  Lanes sums[ROWS][2] = {};
  for (int64_t k = 0; k < count; k++) {
    const Words a = load<Words>(w + k * PANEL), b = load<Words>(w + k * PANEL + LANES);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++) {
      const Words x = Words{} + in[r * count + k];
      sums[r][0] = fused<T>(sums[r][0], x, a);
      sums[r][1] = fused<T>(sums[r][1], x, b);
    }
  }
  const int64_t some = std::min<int64_t>(PANEL, m.outputs - first);
  const float* bias = m.bias ? m.bias + first : nullptr;
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; r++) {
    float result[PANEL], *to = y + r * m.outputs + first;
#pragma GCC unroll 4
    for (int v = 0; v < 2; v++) {
      Lanes sum = sums[r][v];
      std::memcpy(result + v * LANES, &sum, sizeof sum);
    }
    finish(result, some, bias, to, onto);
  }
}

template <class T, int ROWS>
void last_rows(const Matrix& m, int64_t panel, const T* x, float* y, bool onto, int64_t rows) {
  if constexpr (ROWS > 0) {
    if (rows == ROWS) return tile<T, ROWS>(m, panel, x, y, onto);
    last_rows<T, ROWS - 1>(m, panel, x, y, onto, rows);
  }
}

// Called by all threads: each takes some of the panels.
template <class T>
void product(const Matrix& m, const T* x, float* y, int64_t rows, bool onto = false) {
#pragma omp for schedule(static)
  for (int64_t panel = 0; panel < (m.outputs + PANEL - 1) / PANEL; panel++) {
    int64_t row = 0;
    for (; row + TILE <= rows; row += TILE)
      tile<T, TILE>(m, panel, x + row * m.inputs, y + row * m.outputs, onto);
    last_rows<T, TILE - 1>(m, panel, x + row * m.inputs, y + row * m.outputs, onto, rows - row);
  }
}

// What lies between products --------------------------------------------------------------------

inline float squares(const float* x, int64_t width) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < width; i++) sum += x[i] * x[i];
  return sum;
}

// x / sqrt(sum x^2 + d eps); the rest of RMSNorm is in the matrix behind it.
template <class T>
void normalised(const float* x, int64_t width, float eps, T* to) {
  const float factor = 1 / std::sqrt(squares(x, width) + eps * eps);
  for (int64_t i = 0; i < width; i++) put(x[i] * factor, to[i]);
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

// Attention of one query, over the columns that it sees: softmax(q K' / sqrt(E)) V.
// E is the width of a head; `next` are the keys that will be read next. The scores are its own; they have room for one vector more than columns.
template <class T, int E>
void attend(const float* q, const T* keys, const T* values, const T* next, int64_t seen,
            float* scores, T* to) {
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
  float top = scores[0], whole = 0;
#pragma omp simd reduction(max : top)
  for (int64_t c = 0; c < seen; c++) top = std::max(top, scores[c]);
#pragma omp simd reduction(+ : whole)
  for (int64_t c = 0; c < seen; c++) whole += scores[c] = exponential(scores[c] - top);
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
template <class T>
void attend(const float* q, const T* keys, const T* values, int64_t seen, int64_t e, float* scores,
            T* to) {
  float top = -INFINITY, whole = 0, scale = 1 / std::sqrt(float(e));
  for (int64_t c = 0; c < seen; c++) {
    float sum = 0;
    for (int64_t i = 0; i < e; i++) sum += q[i] * widened(keys[c * e + i]);
    scores[c] = sum * scale;
    top = std::max(top, scores[c]);
  }
  for (int64_t c = 0; c < seen; c++) whole += scores[c] = exponential(scores[c] - top);
  for (int64_t i = 0; i < e; i++) {
    float sum = 0;
    for (int64_t c = 0; c < seen; c++) sum += scores[c] * widened(values[c * e + i]);
    put(sum / whole, to[i]);
  }
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

template <class T>
struct Call {
  const Model& m;
  const Store& store;
  int64_t count;          // tokens
  const int64_t* rows;    // of each token
  const int64_t* places;  // of each token in its row
  float* x;               // (count, hidden)
  T* in;                  // inputs of products
  float* wide;            // outputs of products
  float* scores;          // of one thread

  T* cached(int64_t layer, int64_t part, int64_t row, int64_t head) const {
    int64_t stretch = ((layer * 2 + part) * store.rows + row) * m.kv_heads + head;
    return static_cast<T*>(store.start) + stretch * store.columns * m.width;
  }

  void normalise() const {
#pragma omp for schedule(static)
    for (int64_t t = 0; t < count; t++)
      normalised(x + t * m.hidden, m.hidden, m.eps, in + t * m.hidden);
  }

  // Rotate queries and keys; keys and values go into the cache.
  void turn(int64_t number) const {
    const int64_t all = m.heads + 2 * m.kv_heads, rotated = m.heads + m.kv_heads;
    const float* norm = m.layers[number].head_norm;
#pragma omp for schedule(static)
    for (int64_t each = 0; each < count * all; each++) {
      int64_t t = each / all, h = each % all, place = places[t];
      float* head = wide + each * m.width;
      if (h < rotated)
        turned(head, m.width, norm ? norm + h * m.width : nullptr, m.head_eps,
               m.cos + place * (m.width / 2), m.sin + place * (m.width / 2));
      if (h < m.heads) continue;
      int64_t own = (h - m.heads) % m.kv_heads;
      T* to = cached(number, h >= rotated, rows[t], own) + place * m.width;
      for (int64_t i = 0; i < m.width; i++) put(head[i], to[i]);
    }
  }

  void attention(int64_t number) const {
    const int64_t all = m.heads + 2 * m.kv_heads, group = m.heads / m.kv_heads;
#pragma omp for schedule(static)
    for (int64_t each = 0; each < count * m.kv_heads; each++) {
      int64_t t = each / m.kv_heads, own = each % m.kv_heads;
      const T* keys = cached(number, 0, rows[t], own);
      const T* values = cached(number, 1, rows[t], own);
      const int64_t later = std::min(each + 1, count * m.kv_heads - 1);
      const T* next = cached(number, 0, rows[later / m.kv_heads], later % m.kv_heads);
      for (int64_t h = own * group; h < (own + 1) * group; h++) {
        const float* q = wide + (t * all + h) * m.width;
        T* to = in + (t * m.heads + h) * m.width;
        const int64_t seen = places[t] + 1;
        if (m.width == 32) attend<T, 32>(q, keys, values, next, seen, scores, to);
        else if (m.width == 64) attend<T, 64>(q, keys, values, next, seen, scores, to);
        else if (m.width == 128) attend<T, 128>(q, keys, values, next, seen, scores, to);
        else attend(q, keys, values, seen, m.width, scores, to);
      }
    }
  }

  void gate() const {
#pragma omp for schedule(static)
    for (int64_t t = 0; t < count; t++) {
      const float* from = wide + t * 2 * m.inner;
      gated(from, from + m.inner, m.inner, in + t * m.inner);
    }
  }

  // Called by all threads, as everything above; each part ends with their waiting for each other.
  void run() const {
    for (int64_t number = 0; number < m.depth; number++) {
      const Layer& layer = m.layers[number];
      normalise();
      product(layer.into_heads, in, wide, count);
      turn(number);
      attention(number);
      product(layer.out_of_heads, in, x, count, true);
      normalise();
      product(layer.widen, in, wide, count);
      gate();
      product(layer.narrow, in, x, count, true);
    }
  }

  // Logits of some of the tokens, whose numbers rise from `from`.
  void name(const int64_t* wanted, int64_t number, int64_t from, float* logits) const {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < number; i++)
      normalised(x + (wanted[i] - from) * m.hidden, m.hidden, m.eps, in + i * m.hidden);
    product(m.head, in, logits, number);
  }
};

constexpr int64_t AT_ONCE = 256;  // tokens: their numbers stay in a processor's cache

template <class T>
void forward(const Model& m, const Store& store, int64_t count, const int64_t* rows,
             const int64_t* places, float* x, const int64_t* wanted, int64_t number, float* logits,
             int threads) {
  const int64_t most = std::min(count, AT_ONCE);
  const int64_t heads = (m.heads + 2 * m.kv_heads) * m.width;
  const int64_t widest_in = std::max({m.hidden, m.heads * m.width, m.inner});
  thread_local std::vector<T> in;
  thread_local std::vector<float> wide;
  in.resize(std::max<size_t>(in.size(), most * widest_in));
  wide.resize(std::max<size_t>(wide.size(), most * std::max(heads, 2 * m.inner)));
  T* in_start = in.data();
  float* wide_start = wide.data();
#pragma omp parallel num_threads(threads)
  {
    thread_local std::vector<float> scores;
    scores.resize(std::max<size_t>(scores.size(), store.columns + m.width));
    int64_t named = 0;
    for (int64_t from = 0; from < count; from += AT_ONCE) {
      int64_t to = std::min(from + AT_ONCE, count), end = named;
      while (end < number && wanted[end] < to) end++;
      Call<T> call{m, store, to - from, rows + from, places + from, x + from * m.hidden,
                   in_start, wide_start, scores.data()};
      call.run();
      call.name(wanted + named, end - named, from, logits + named * m.head.outputs);
      named = end;
    }
  }
}

}  // namespace

extern "C" {

int64_t panel_width() { return PANEL; }

void forward_float32(const Model* m, const Store* store, int64_t count, const int64_t* rows,
                     const int64_t* places, float* x, const int64_t* wanted, int64_t number,
                     float* logits, int threads) {
  forward<float>(*m, *store, count, rows, places, x, wanted, number, logits, threads);
}

void forward_bfloat16(const Model* m, const Store* store, int64_t count, const int64_t* rows,
                      const int64_t* places, float* x, const int64_t* wanted, int64_t number,
                      float* logits, int threads) {
  forward<Bfloat16>(*m, *store, count, rows, places, x, wanted, number, logits, threads);
}
}
