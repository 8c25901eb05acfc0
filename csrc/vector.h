// Vectors of W numbers, through the compiler's own vector types: one source for every instruction set.
// Everything here is compiled once per instruction set, in the namespace IDRM_CAPABILITY, and uses nothing of the
// standard library: a shared inline function compiled for a newer CPU could be the copy that the linker keeps. For the
// same reason the functions of problem.h and plan.h are always inlined, so that there are no copies of them.
#pragma once

#include "problem.h"

namespace idrm {
namespace IDRM_CAPABILITY {

template <class T>
struct Bits;
template <>
struct Bits<float> {
  using type = int32_t;
  static constexpr int mantissa = 23, bias = 127;
};
template <>
struct Bits<double> {
  using type = int64_t;
  static constexpr int mantissa = 52, bias = 1023;
};

template <class T, int W>
struct Vector {
  typedef T type __attribute__((vector_size(W * sizeof(T))));
  typedef T unaligned __attribute__((vector_size(W * sizeof(T)), aligned(sizeof(T)), may_alias));
  typedef typename Bits<T>::type integer __attribute__((vector_size(W * sizeof(T))));

  static IDRM_INLINE type load(const T* p) { return *reinterpret_cast<const unaligned*>(p); }
  static IDRM_INLINE void store(T* p, type v) { *reinterpret_cast<unaligned*>(p) = v; }
  static IDRM_INLINE type broadcast(T x) { return x - type{}; }
  static IDRM_INLINE type max(type a, type b) { return a > b ? a : b; }

  // Lanes below count keep their value, others become the filler.
  static IDRM_INLINE type head(type v, int64_t count, T filler) {
    integer lane;
    for (int i = 0; i < W; ++i) lane[i] = i;
    return lane < static_cast<typename Bits<T>::type>(count) ? v : broadcast(filler);
  }

  static IDRM_INLINE T sum(type v) {
    T lanes[W];
    store(lanes, v);
    for (int half = W / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return lanes[0];
  }

  static IDRM_INLINE T maximum(type v) {
    T lanes[W];
    store(lanes, v);
    for (int half = W / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
    return lanes[0];
  }

  // 2 ** x for x <= 0, within 2 units in the last place; 0 below the smallest normal number.
  static IDRM_INLINE type exp2(type x) {
    constexpr int mantissa = Bits<T>::mantissa, bias = Bits<T>::bias;
    const type lowest = broadcast(-bias);
    x = x < lowest ? lowest : x;
    const type rounder = broadcast(static_cast<T>(3) * (static_cast<typename Bits<T>::type>(1) << (mantissa - 1)));
    const type shifted = x + rounder;
    const type f = x - (shifted - rounder);
    const integer exponent = (reinterpret_cast<integer>(shifted) + bias) << mantissa;
    return fraction(f) * reinterpret_cast<type>(exponent);
  }

 private:
  // 2 ** f for |f| <= 1/2: Cephes' polynomial for float, Taylor's for double.
  static IDRM_INLINE type fraction(type f) {
    if constexpr (sizeof(T) == 4) {
      type y = broadcast(1.535336188319500e-4f);
      y = y * f + 1.339887440266574e-3f;
      y = y * f + 9.618437357674640e-3f;
      y = y * f + 5.550332471162809e-2f;
      y = y * f + 2.402264791363012e-1f;
      y = y * f + 6.931472028550421e-1f;
      return y * f + 1.0f;
    } else {
      constexpr double ln2 = 0.693147180559945309417;
      type y = broadcast(1.0);
      for (int k = 14; k > 0; --k) y = y * f * (ln2 / k) + 1.0;
      return y;
    }
  }
};

// The upper half of a float, rounded to nearest even; NaN stays NaN.
IDRM_INLINE uint16_t to_bfloat16(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  if (x != x) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

IDRM_INLINE float from_bfloat16(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

// Without branches, for loops of it to be vectorised.
IDRM_INLINE float from_float16(uint16_t x) {
  const uint32_t sign = static_cast<uint32_t>(x & 0x8000) << 16, magnitude = x & 0x7fff;
  const float subnormal = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f;
  uint32_t bits;
  __builtin_memcpy(&bits, &subnormal, 4);
  bits = magnitude < 0x400 ? bits : (magnitude << 13) + ((127 - 15) << 23);
  bits += magnitude < 0x7c00 ? 0 : (127 - 15) << 23;
  bits |= sign;
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

}  // namespace IDRM_CAPABILITY
}  // namespace idrm
