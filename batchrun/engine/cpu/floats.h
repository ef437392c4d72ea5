// Products in float32, whose sums stay in registers.

#pragma once

#include "vectors.h"

namespace {

constexpr int kRows = kLanes == 16 ? 12 : 6;  // whose sums of 16 (or 32) columns fit the registers

// c [rows, 16 * columns] = a [rows, k] . b, whose groups of 16 columns are [k, 16] each, `step` apart;
// or what is added to c.
struct Product {
  const float* a;
  int64_t a_stride, rows;
  const float* b;
  int64_t step, k;
  float* c;
  int64_t c_stride;
  bool adds = false;
};

template <int rows, int columns>
inline void multiply(const Product& p, Ahead ahead) {
  Sixteen sums[rows][columns] = {};
  for (int64_t i = 0; i < p.k; i++) {
    if (i % 32 == 0) ahead.step();
    Sixteen b[columns];
    for (int n = 0; n < columns; n++) b[n] = load(p.b + n * p.step + i * 16);
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++)
      for (int n = 0; n < columns; n++) sums[r][n] = sums[r][n] + all(p.a[r * p.a_stride + i]) * b[n];
  }
  for (int r = 0; r < rows; r++)
    for (int n = 0; n < columns; n++) {
      float* c = p.c + r * p.c_stride + n * 16;
      store(p.adds ? load(c) + sums[r][n] : sums[r][n], c);
    }
}

// Two groups of columns: at once if the registers hold the sums.
template <int rows>
inline void multiply_rows(Product p, Ahead ahead) {
  if constexpr (kLanes == 16 || rows <= kRows / 2) {
    multiply<rows, 2>(p, ahead);
  } else {
    multiply<rows, 1>(p, ahead);
    p.b += p.step, p.c += 16;
    multiply<rows, 1>(p, {});
  }
}

template <int most>
inline void multiply_some(const Product& p, Ahead ahead) {
  if constexpr (most == 1) {
    multiply_rows<1>(p, ahead);
  } else if (p.rows == most) {
    multiply_rows<most>(p, ahead);
  } else {
    multiply_some<most - 1>(p, ahead);
  }
}

// All rows by two groups of columns.
inline void multiply_pair(Product p, Ahead ahead = {}) {
  for (int64_t left = p.rows; left; left -= p.rows, ahead = {}) {
    p.rows = std::min<int64_t>(left, kRows);
    multiply_some<kRows>(p, ahead);
    p.a += p.rows * p.a_stride, p.c += p.rows * p.c_stride;
  }
}

}  // namespace
