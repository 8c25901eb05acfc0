// Products of small blocks that lie in cache: C (rows, columns) = scale * A B, or C += A B.
#pragma once

#include "arithmetic.h"

namespace idrm {
namespace IDRM_CAPABILITY {

// A matrix of units with any strides; B's columns are contiguous.
template <class Unit>
struct Operand {
  const Unit* data;
  int64_t row, step;  // between rows (A) and between steps of the summed dimension
};

template <class A, int MR, int NR, bool kAccumulate>
IDRM_INLINE void product_tile(
    int64_t depth, Operand<typename A::Unit> a, Operand<typename A::Unit> b, typename A::T* c, int64_t c_row,
    typename A::T scale) {
  using V = typename A::V;
  using Vec = typename A::Vec;
  Vec sums[MR][NR] = {};
  const typename A::Unit* pa = a.data;
  const typename A::Unit* pb = b.data;
  for (int64_t k = 0; k < depth; ++k, pa += a.step, pb += b.step) {
    Vec columns[NR];
#pragma GCC unroll 8
    for (int n = 0; n < NR; ++n) columns[n] = A::load(pb + n * A::W);
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      const Vec row = A::broadcast(pa + m * a.row);
#pragma GCC unroll 8
      for (int n = 0; n < NR; ++n) sums[m][n] = A::multiply_add(row, columns[n], sums[m][n]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < NR; ++n) {
      typename A::T* p = c + m * c_row + n * A::W;
      V::store(p, kAccumulate ? V::load(p) + sums[m][n] : sums[m][n] * scale);
    }
}

template <class A, int MR, int NR, bool kAccumulate>
IDRM_INLINE void product_rows(
    int64_t rows, int64_t depth, Operand<typename A::Unit> a, Operand<typename A::Unit> b, typename A::T* c,
    int64_t c_row, typename A::T scale) {
  for (; rows >= MR; rows -= MR, a.data += MR * a.row, c += MR * c_row)
    product_tile<A, MR, NR, kAccumulate>(depth, a, b, c, c_row, scale);
  if constexpr (MR > 1) {
    if (rows) product_rows<A, MR / 2, NR, kAccumulate>(rows, depth, a, b, c, c_row, scale);
  }
}

template <class A, int NR, bool kAccumulate>
IDRM_INLINE void product_columns(
    int64_t rows, int64_t columns, int64_t depth, Operand<typename A::Unit> a, Operand<typename A::Unit> b,
    typename A::T* c, int64_t c_row, typename A::T scale) {
  constexpr int width = NR * A::W;
  for (; columns >= width; columns -= width, b.data += width, c += width)
    product_rows<A, A::MR, NR, kAccumulate>(rows, depth, a, b, c, c_row, scale);
  if constexpr (width > kAlignment) {
    if (columns) product_columns<A, NR / 2, kAccumulate>(rows, columns, depth, a, b, c, c_row, scale);
  }
}

// `columns` is a multiple of kAlignment. An entry of C is summed in the same order wherever it lies in a tile.
template <class A, bool kAccumulate>
__attribute__((noinline)) void product(
    int64_t rows, int64_t columns, int64_t depth, Operand<typename A::Unit> a, Operand<typename A::Unit> b,
    typename A::T* c, int64_t c_row, typename A::T scale = 1) {
  product_columns<A, A::NR, kAccumulate>(rows, columns, depth, a, b, c, c_row, scale);
}

}  // namespace IDRM_CAPABILITY
}  // namespace idrm
