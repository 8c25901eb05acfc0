// Queries and keys as the products read them: aligned, padded with zeros, columns of a panel side by side.
#pragma once

#include "arithmetic.h"

namespace idrm {
namespace IDRM_CAPABILITY {

template <class A>
constexpr int64_t units_of(int64_t depth) {
  return (depth + A::depth_of_unit - 1) / A::depth_of_unit;
}

// The inverse of read_row: float32, float64 or bfloat16.
template <class T>
IDRM_INLINE void write_row(void* out, Element element, int64_t at, const T* values, int64_t count) {
  switch (element) {
    case Element::float32:
      for (int64_t c = 0; c < count; ++c) static_cast<float*>(out)[at + c] = static_cast<float>(values[c]);
      break;
    case Element::float64:
      for (int64_t c = 0; c < count; ++c) static_cast<double*>(out)[at + c] = static_cast<double>(values[c]);
      break;
    case Element::bfloat16:
      for (int64_t c = 0; c < count; ++c)
        static_cast<uint16_t*>(out)[at + c] = to_bfloat16(static_cast<float>(values[c]));
      break;
    case Element::float16: __builtin_unreachable();
  }
}

template <class A>
struct Packing {
  using T = typename A::T;
  using Unit = typename A::Unit;

  // Two bfloat16 of one token's head, the second zero beyond its head_dim.
  static IDRM_INLINE Unit pair_of_row(const Side& side, const void* data, int64_t offset, int64_t step) {
    const uint16_t* row = static_cast<const uint16_t*>(data) + offset;
    const uint32_t low = row[2 * step];
    return 2 * step + 1 < side.head_dim ? low | static_cast<uint32_t>(row[2 * step + 1]) << 16 : low;
  }

  // Keys of one kv head for the scores: panels of kPanel columns, each (units of head_dim, columns of the panel).
  static void transposed_keys(const Side& side, const ExampleSide& keys, int64_t kv_head, Unit* out) {
    const Columns& ranges = keys.ranges;
    const int64_t depth = units_of<A>(side.head_dim);
    __builtin_memset(out, 0, ranges.width * depth * sizeof(Unit));
    for (int64_t z = 0; z < keys.num_ranges; ++z)
      for (int64_t j = 0; j < ranges.count[z]; ++j) {
        const int64_t column = ranges.column[z] + j, panel = column / kPanel * kPanel;
        const int64_t width = ranges.width - panel < kPanel ? ranges.width - panel : kPanel;
        Unit* p = out + panel * depth + (column - panel);
        const int64_t offset = ((ranges.first[z] + j) * side.num_kv_heads + kv_head) * side.head_dim;
        if constexpr (A::depth_of_unit == 1) {
          T numbers[kAlignment];
          for (int64_t step = 0; step < depth; step += kAlignment) {
            const int64_t left = depth - step, count = left < kAlignment ? left : kAlignment;
            read_row(side.k, side.element, offset + step, count, count, numbers);
            for (int64_t c = 0; c < count; ++c) p[(step + c) * width] = numbers[c];
          }
        } else {
          for (int64_t step = 0; step < depth; ++step) p[step * width] = pair_of_row(side, side.k, offset, step);
        }
      }
  }

  // Keys of one kv head for dq: (units of columns, padded head_dim).
  static void natural_keys(const Side& side, const ExampleSide& keys, int64_t kv_head, Unit* out) {
    const Columns& ranges = keys.ranges;
    const int64_t padded = aligned(side.head_dim);
    __builtin_memset(out, 0, units_of<A>(ranges.width) * padded * sizeof(Unit));
    for (int64_t z = 0; z < keys.num_ranges; ++z)
      natural_rows(
          side, side.k, side.num_kv_heads, kv_head, ranges.first[z], ranges.count[z],
          out + ranges.column[z] / A::depth_of_unit * padded);
  }

  // Some tokens' head as (units of tokens, padded head_dim).
  static void natural_rows(
      const Side& side, const void* data, int64_t num_heads, int64_t head, int64_t first, int64_t count, Unit* out) {
    const int64_t padded = aligned(side.head_dim);
    for (int64_t i = 0; i < count; i += A::depth_of_unit) {
      const int64_t offset = ((first + i) * num_heads + head) * side.head_dim;
      Unit* row = out + i / A::depth_of_unit * padded;
      if constexpr (A::depth_of_unit == 1) {
        read_row(data, side.element, offset, side.head_dim, padded, row);
      } else {
        const uint16_t* even = static_cast<const uint16_t*>(data) + offset;
        const uint16_t* odd = even + num_heads * side.head_dim;
        const bool both = i + 1 < count;
        for (int64_t c = 0; c < side.head_dim; ++c) row[c] = even[c] | (both ? static_cast<uint32_t>(odd[c]) << 16 : 0);
        for (int64_t c = side.head_dim; c < padded; ++c) row[c] = 0;
      }
    }
  }

  // Some tokens' head for the scores: (tokens, units of head_dim).
  static void query_rows(const Side& side, int64_t head, int64_t first, int64_t count, Unit* out) {
    const int64_t depth = units_of<A>(side.head_dim);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t offset = ((first + i) * side.num_heads + head) * side.head_dim;
      Unit* row = out + i * depth;
      if constexpr (A::depth_of_unit == 1) {
        read_row(side.q, side.element, offset, side.head_dim, side.head_dim, row);
      } else {
        for (int64_t step = 0; step < depth; ++step) row[step] = pair_of_row(side, side.q, offset, step);
      }
    }
  }
};

}  // namespace IDRM_CAPABILITY
}  // namespace idrm
