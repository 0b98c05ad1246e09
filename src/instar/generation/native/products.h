// Products with matrices that are kept in the order in which they are read.

#pragma once

#include <algorithm>

#include "numbers.h"

namespace {

// A matrix lies in panels of PANEL outputs; in a panel, first comes the first word of every output.
constexpr int PANEL = 2 * LANES;
// Rows that are multiplied together: as many as there are registers for their sums.
constexpr int TILE = LANES == 16 ? 12 : 6;

struct Matrix {
  const char* panels;
  const float* scales;  // of the outputs; none are one
  const float* bias;    // or none
  int64_t inputs, outputs;
};

// A weight of eight bits.
struct Byte {
  std::int8_t value;
};

// LANES words of weights of type W, and how many bytes a word takes.
template <class W>
constexpr int64_t WORD_BYTES = 4;
template <class W>
inline Words weights(const char* from) {
  return load<Words>(from);
}

// Two bytes are made two numbers of sixteen bits.
template <>
constexpr int64_t WORD_BYTES<Byte> = 2;
template <>
inline Words weights<Byte>(const char* from) {
  return same_bits<Words>(widened(load<Bytes>(from)));
}

// The inputs of a product, a row each token.
template <class T>
struct Inputs {
  T* rows;
  float* scales;  // of the rows; none are one

  Inputs from(int64_t row, int64_t width) const {
    return {rows + row * width, scales ? scales + row : nullptr};
  }
};

// Part of a row of a product: y = scale sum + bias, or that added onto y. A copy of it in every
// row of every tile would be no faster, and take most of the time of compiling.
[[gnu::noinline]] void finish(const Matrix& m, int64_t first, const float* sum, float scale, float* y,
                              bool onto) {
  const float* scales = m.scales ? m.scales + first : nullptr;
  const float* bias = m.bias ? m.bias + first : nullptr;
  const int64_t count = std::min<int64_t>(PANEL, m.outputs - first);
  for (int64_t i = 0; i < count; i++)
    y[i] = sum[i] * (scales ? scales[i] * scale : scale) + (bias ? bias[i] : 0) + (onto ? y[i] : 0);
}

// ROWS rows times one panel: y = x W' + b, or that added onto y.
template <class T, class W, int ROWS>
void tile(const Matrix& m, int64_t panel, Inputs<T> x, float* y, bool onto) {
  constexpr int64_t LINE = PANEL * WORD_BYTES<W>;  // a word of every output
  const int64_t count = words<T>(m.inputs), first = panel * PANEL;
  const char* w = m.panels + panel * count * LINE;
  // Loops over these are unrolled, and no address is taken, so that they stay in registers.
  Sums<T> sums[ROWS][2] = {};
  for (int64_t k = 0; k < count; k++) {
    const Words a = weights<W>(w + k * LINE), b = weights<W>(w + k * LINE + LINE / 2);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++) {
      const Words word = Words{} + load<uint32_t>(x.rows + r * m.inputs + k * (4 / int64_t(sizeof(T))));
      sums[r][0] = fused<T>(sums[r][0], word, a);
      sums[r][1] = fused<T>(sums[r][1], word, b);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; r++) {
    const Lanes a = as_floats(sums[r][0]), b = as_floats(sums[r][1]);
    float sum[PANEL];
    std::memcpy(sum, &a, sizeof a);
    std::memcpy(sum + LANES, &b, sizeof b);
    finish(m, first, sum, x.scales ? x.scales[r] : 1, y + r * m.outputs + first, onto);
  }
}

// The same for any number of rows up to ROWS.
template <class T, class W, int ROWS>
void some_rows(const Matrix& m, int64_t panel, Inputs<T> x, float* y, bool onto, int64_t rows) {
  if constexpr (ROWS > 0) {
    if (rows == ROWS) return tile<T, W, ROWS>(m, panel, x, y, onto);
    some_rows<T, W, ROWS - 1>(m, panel, x, y, onto, rows);
  }
}

// x W' + b of some rows, or that added onto y. Called by all threads, who share the panels. Tiles
// are of like height: a low one would leave registers unused.
template <class T, class W>
void product(const Matrix& m, Inputs<T> x, float* y, int64_t rows, bool onto = false) {
  const int64_t tiles = (rows + TILE - 1) / TILE;
#pragma omp for schedule(static)
  for (int64_t panel = 0; panel < (m.outputs + PANEL - 1) / PANEL; panel++)
    for (int64_t i = 0; i < tiles; i++) {
      const int64_t row = rows * i / tiles, end = rows * (i + 1) / tiles;
      some_rows<T, W, TILE>(m, panel, x.from(row, m.inputs), y + row * m.outputs, onto, end - row);
    }
}

}  // namespace
