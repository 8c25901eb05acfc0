// From numerators and d loss / d P of some rows to their parts of dq and dk, one head at a time.
#pragma once

#include "attention_maps.h"

namespace idrm {
namespace IDRM_CAPABILITY {

// d loss / d scores of some rows and at most kPanel keys, as the left operand of dq's product and of dk's.
template <class A>
struct ScoreGradients {
  using T = typename A::T;
  using Unit = typename A::Unit;
  using V = typename A::V;
  using Vec = typename A::Vec;

  // Units that the block takes for this many rows.
  static constexpr int64_t size(int64_t rows) {
    return A::depth_of_unit == 1 ? rows * kPanel : (rows + 1) / 2 * 2 * kPanel;
  }

  // One row and its neighbour (null where there is none): numerators, derivatives (null: 0), 1 / denominator, delta.
  struct Row {
    const T* numerators;
    const T* derivatives;
    T inverse, delta;

    IDRM_INLINE Vec at(int64_t j) const {
      const Vec p = V::load(numerators + j) * V::broadcast(inverse);
      const Vec derivative = derivatives == nullptr ? Vec{} : V::load(derivatives + j);
      return p * (derivative - V::broadcast(delta));
    }
  };

  // row_at(i) is row i's Row, or something else with its `at`; asked for in order.
  template <class RowAt>
  static void write(Unit* out, int64_t rows, int64_t columns, const RowAt& row_at) {
    for (int64_t i = 0; i < rows; i += 2) {
      const auto even = row_at(i);
      const bool both = i + 1 < rows;
      const auto odd = both ? row_at(i + 1) : even;
      write_two(out, rows, i, even, both ? &odd : nullptr, columns);
    }
  }

  static IDRM_INLINE Operand<Unit> by_row(const Unit* block) { return {block, kPanel / A::depth_of_unit, 1}; }

  static IDRM_INLINE Operand<Unit> by_key(const Unit* block, int64_t rows) {
    return {A::depth_of_unit == 1 ? block : block + (rows + 1) / 2 * kPanel, 1, kPanel};
  }

 private:
  template <class AnyRow>
  static IDRM_INLINE void write_two(
      Unit* out, int64_t rows, int64_t row, const AnyRow& even, const AnyRow* odd, int64_t columns) {
    if constexpr (A::depth_of_unit == 1) {
      for (int64_t j = 0; j < columns; j += A::W) V::store(out + row * kPanel + j, even.at(j));
      if (odd != nullptr)
        for (int64_t j = 0; j < columns; j += A::W) V::store(out + (row + 1) * kPanel + j, odd->at(j));
    } else {
      write_pairs(out, rows, row, even, odd, columns);
    }
  }

#ifdef IDRM_BFLOAT16_PAIRS
  // Pairs of keys first, (rows, kPanel / 2); then pairs of rows, (rows / 2, kPanel).
  template <class AnyRow>
  static IDRM_INLINE void write_pairs(
      Unit* out, int64_t rows, int64_t row, const AnyRow& even, const AnyRow* odd, int64_t columns) {
    Unit* by_rows = out + (rows + 1) / 2 * kPanel + row / 2 * kPanel;
    for (int64_t j = 0; j < columns; j += 16) {
      const __m256i low = (__m256i)_mm512_cvtneps_pbh((__m512)even.at(j));
      const __m256i high = odd == nullptr ? _mm256_setzero_si256() : (__m256i)_mm512_cvtneps_pbh((__m512)odd->at(j));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + row * (kPanel / 2) + j / 2), low);
      if (odd != nullptr)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + (row + 1) * (kPanel / 2) + j / 2), high);
      const __m512i pairs = _mm512_or_si512(
          _mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
      _mm512_storeu_si512(by_rows + j, pairs);
    }
  }
#else
  template <class AnyRow>
  static IDRM_INLINE void write_pairs(Unit*, int64_t, int64_t, const AnyRow&, const AnyRow*, int64_t) {}
#endif
};

}  // namespace IDRM_CAPABILITY
}  // namespace idrm
