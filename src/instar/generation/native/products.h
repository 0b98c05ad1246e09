// Products with matrices that are kept in the order in which they are read.

#pragma once

#include <algorithm>

#include "numbers.h"

namespace {

// A matrix lies in panels of PANEL outputs; in a panel, first comes the first word of every output.
constexpr int PANEL = 2 * LANES;
// Rows that are multiplied together: as many as there are registers for their sums.
template <class T>
constexpr int TILE = LANES == 16 && !std::is_same_v<T, Small> ? 12 : 6;

struct Matrix {
  const char* panels;
  const float* scales;  // of the outputs; none are one
  const float* bias;    // or none
  int64_t inputs, outputs;
};

// LANES words of weights for inputs of type T, and how many bytes a word takes. Weights are of that
// type themselves, or of eight bits where it is of whole numbers.
template <class T>
constexpr int64_t WORD_BYTES = is_whole<T> ? IN_WORD<T> : 4;
template <class T>
inline Words weights(const char* from) {
  return load<Words>(from);
}

// Two bytes are made two numbers of sixteen bits.
template <>
inline Words weights<Fixed>(const char* from) {
  return same_bits<Words>(widened(load<Bytes>(from)));
}

// Whole numbers stand for `factor` times each. Weights that small ones are multiplied by are stored
// with 128 added, as the instruction wants them; `start` is what that will have added to a sum, less
// than nothing.
struct Scale {
  float factor;
  std::int32_t start;
};

// The inputs of a product, a row each token, of whole words.
template <class T>
struct Inputs {
  T* rows;
  Scale* scales;  // of whole numbers

  // Of a row: one, or one for each span.
  static constexpr int64_t scales_of(int64_t width) {
    return std::is_same_v<T, Small> ? (width + SPAN - 1) / SPAN : 1;
  }

  Inputs from(int64_t row, int64_t width) const {
    return {rows + row * words<T>(width) * IN_WORD<T>, scales + row * scales_of(width)};
  }
};

// Part of a row of a product: y = scales sum + bias, or that added onto y. A copy of it in every
// row of every tile would be no faster, and take most of the time of compiling.
[[gnu::noinline]] void finish(const Matrix& m, int64_t first, const float* sum, float* y, bool onto) {
  const float* scales = m.scales ? m.scales + first : nullptr;
  const float* bias = m.bias ? m.bias + first : nullptr;
  const int64_t count = std::min<int64_t>(PANEL, m.outputs - first);
  for (int64_t i = 0; i < count; i++)
    y[i] = sum[i] * (scales ? scales[i] : 1) + (bias ? bias[i] : 0) + (onto ? y[i] : 0);
}

// The sums of ROWS rows and the panel at w.
template <class T, int ROWS>
void add_up(const char* w, int64_t inputs, Inputs<T> x, Lanes (*to)[2]) {
  constexpr int64_t LINE = PANEL * WORD_BYTES<T>;  // a word of every output
  const int64_t count = words<T>(inputs), span = std::is_same_v<T, Small> ? words<T>(SPAN) : count;
  const int64_t spans = Inputs<T>::scales_of(inputs);
  // Loops over these are unrolled, and no address is taken, so that they stay in registers.
  Lanes all[ROWS][2] = {};
  for (int64_t s = 0; s < spans; s++) {
    Sums<T> sums[ROWS][2] = {};
    if constexpr (std::is_same_v<T, Small>) {
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; r++) sums[r][0] = sums[r][1] = Sums<T>{} + x.scales[r * spans + s].start;
    }
    const int64_t end = std::min((s + 1) * span, count);
#pragma GCC unroll 2
    for (int64_t k = s * span; k < end; k++) {
      const Words a = weights<T>(w + k * LINE), b = weights<T>(w + k * LINE + LINE / 2);
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; r++) {
        const Words word = Words{} + load<uint32_t>(x.rows + (r * count + k) * IN_WORD<T>);
        sums[r][0] = fused<T>(sums[r][0], word, a);
        sums[r][1] = fused<T>(sums[r][1], word, b);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
      for (int half = 0; half < 2; half++) {
        const Lanes sum = as_floats(sums[r][half]);
        if constexpr (is_whole<T>) all[r][half] += x.scales[r * spans + s].factor * sum;
        else all[r][half] = sum;
      }
  }
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; r++) {
    to[r][0] = all[r][0];
    to[r][1] = all[r][1];
  }
}

// ROWS rows times one panel: y = x W' + b, or that added onto y.
template <class T, int ROWS>
void tile(const Matrix& m, int64_t panel, Inputs<T> x, float* y, bool onto) {
  const int64_t first = panel * PANEL;
  Lanes sums[ROWS][2];
  add_up<T, ROWS>(m.panels + first * words<T>(m.inputs) * WORD_BYTES<T>, m.inputs, x, sums);
  for (int r = 0; r < ROWS; r++) {
    float sum[PANEL];
    std::memcpy(sum, sums[r], sizeof sum);
    finish(m, first, sum, y + r * m.outputs + first, onto);
  }
}

// The same for any number of rows up to ROWS.
template <class T, int ROWS>
void some_rows(const Matrix& m, int64_t panel, Inputs<T> x, float* y, bool onto, int64_t rows) {
  if constexpr (ROWS > 0) {
    if (rows == ROWS) return tile<T, ROWS>(m, panel, x, y, onto);
    some_rows<T, ROWS - 1>(m, panel, x, y, onto, rows);
  }
}

// x W' + b of some rows, or that added onto y. Called by all threads, who share the panels. Tiles
// are of like height: a low one would leave registers unused.
template <class T>
void product(const Matrix& m, Inputs<T> x, float* y, int64_t rows, bool onto = false) {
  const int64_t tiles = (rows + TILE<T> - 1) / TILE<T>;
#pragma omp for schedule(static)
  for (int64_t panel = 0; panel < (m.outputs + PANEL - 1) / PANEL; panel++)
    for (int64_t i = 0; i < tiles; i++) {
      const int64_t row = rows * i / tiles, end = rows * (i + 1) / tiles;
      some_rows<T, TILE<T>>(m, panel, x.from(row, m.inputs), y + row * m.outputs, onto, end - row);
    }
}

}  // namespace
