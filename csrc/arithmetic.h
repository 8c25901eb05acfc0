// How products are taken: in the numbers that are computed with, or in pairs of bfloat16 with float accumulators.
// An operand is a row of units; one unit is a number, or two bfloat16 that follow one another in the summed dimension.
// Numerator is what keeps softmax numerators to the operands' precision.
#pragma once

#include "plan.h"
#include "vector.h"

#ifdef IDRM_BFLOAT16_PAIRS
#include <immintrin.h>
#endif

namespace idrm {
namespace IDRM_CAPABILITY {

// Products in the numbers themselves. MR x NR vectors are what a product's tile keeps in registers.
template <class T_, int W_, int MR_, int NR_>
struct Plain {
  using T = T_;
  using Unit = T_;
  using Numerator = T_;
  using V = Vector<T, W_>;
  using Vec = typename V::type;
  static constexpr int W = W_, MR = MR_, NR = NR_, depth_of_unit = 1;

  static IDRM_INLINE Vec load(const Unit* p) { return V::load(p); }
  static IDRM_INLINE Vec broadcast(const Unit* p) { return V::broadcast(*p); }
  static IDRM_INLINE Vec load_numerators(const Numerator* p) { return V::load(p); }
  static IDRM_INLINE void store_numerators(Numerator* p, Vec v) { V::store(p, v); }
  static IDRM_INLINE Vec multiply_add(Vec a, Vec b, Vec c) { return a * b + c; }
};

#ifdef IDRM_BFLOAT16_PAIRS
struct BFloat16Pairs {
  using T = float;
  using Unit = uint32_t;
  using Numerator = uint16_t;
  using V = Vector<float, 16>;
  using Vec = V::type;
  static constexpr int W = 16, MR = 6, NR = 4, depth_of_unit = 2;

  static IDRM_INLINE Vec load(const Unit* p) {
    return V::load(reinterpret_cast<const float*>(p));
  }
  static IDRM_INLINE Vec broadcast(const Unit* p) { return (Vec)_mm512_set1_epi32(*p); }
  static IDRM_INLINE Vec load_numerators(const Numerator* p) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
  }
  static IDRM_INLINE void store_numerators(Numerator* p, Vec v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh((__m512)v));
  }
  static IDRM_INLINE Vec multiply_add(Vec a, Vec b, Vec c) {
    return (Vec)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
  }
};
#endif

// A number of q or k as a float or double, whatever it is stored as.
template <class T>
IDRM_INLINE T number(const void* data, Element element, int64_t index) {
  switch (element) {
    case Element::float32: return static_cast<T>(static_cast<const float*>(data)[index]);
    case Element::float64: return static_cast<T>(static_cast<const double*>(data)[index]);
    case Element::bfloat16: return static_cast<T>(from_bfloat16(static_cast<const uint16_t*>(data)[index]));
    case Element::float16: return static_cast<T>(from_float16(static_cast<const uint16_t*>(data)[index]));
  }
  __builtin_unreachable();
}

// One token's head, widened where need be, as the first head_dim of `padded` numbers; the others are 0.
template <class T>
IDRM_INLINE void read_row(const void* data, Element element, int64_t offset, int64_t head_dim, int64_t padded, T* row) {
  switch (element) {
    case Element::float32:
      for (int64_t c = 0; c < head_dim; ++c) row[c] = static_cast<T>(static_cast<const float*>(data)[offset + c]);
      break;
    case Element::float64:
      for (int64_t c = 0; c < head_dim; ++c) row[c] = static_cast<T>(static_cast<const double*>(data)[offset + c]);
      break;
    case Element::bfloat16:
      for (int64_t c = 0; c < head_dim; ++c)
        row[c] = static_cast<T>(from_bfloat16(static_cast<const uint16_t*>(data)[offset + c]));
      break;
    case Element::float16:
      for (int64_t c = 0; c < head_dim; ++c)
        row[c] = static_cast<T>(from_float16(static_cast<const uint16_t*>(data)[offset + c]));
      break;
  }
  for (int64_t c = head_dim; c < padded; ++c) row[c] = 0;
}

}  // namespace IDRM_CAPABILITY
}  // namespace idrm
