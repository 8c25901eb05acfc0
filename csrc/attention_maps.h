// Rows of attention maps: scores, softmax numerators of every head, their mean over heads, and its merging into units.
#pragma once

#include "gemm.h"
#include "packing.h"

namespace idrm {
namespace IDRM_CAPABILITY {

// Some rows (tokens) of one side, of one example and head group.
struct Rows {
  const Problem* problem;
  const Side* side;
  const ExampleSide* keys;
  int64_t first, count;  // tokens of the batch
};

template <class A>
struct Maps {
  using T = typename A::T;
  using Unit = typename A::Unit;
  using V = typename A::V;
  using Vec = typename A::Vec;

  static constexpr T log2e = static_cast<T>(1.44269504088896340736);

  // Keys of segment y that a row may see.
  static IDRM_INLINE int64_t visible(const Rows& rows, int64_t row, int64_t y) {
    const Columns& tokens = rows.keys->tokens;
    if (!rows.side->causal) return tokens.count[y];
    const int64_t seen = rows.first + row + 1 - tokens.first[y];
    return seen < tokens.count[y] ? seen : tokens.count[y];
  }

  // log2(e) times the scores of one head (rows, columns); `queries` as Packing::query_rows makes them.
  static void scores(const Rows& rows, int64_t head, const Unit* queries, const int32_t* slots, T* out) {
    const Side& side = *rows.side;
    const int64_t columns = rows.keys->ranges.width;
    const int64_t depth = units_of<A>(side.head_dim), kv_head = head / (side.num_heads / side.num_kv_heads);
    const Unit* keys = reinterpret_cast<const Unit*>(rows.keys->transposed + kv_head * rows.keys->transposed_bytes);
    const T scale = static_cast<T>(side.softmax_scale) * log2e;
    for (int64_t panel = 0; panel < columns; panel += kPanel) {
      const int64_t width = columns - panel < kPanel ? columns - panel : kPanel;
      product<A, false>(
          rows.count, width, depth, {queries, depth, 1}, {keys + panel * depth, 0, width}, out + panel, columns, scale);
    }
    if (side.positions != nullptr) add_position_bias(rows, head, slots, out);
  }

  // The slot of every pair of a row and a column (rows, columns).
  static void find_slots(const Rows& rows, int32_t* slots) {
    const Side& side = *rows.side;
    const Columns& tokens = rows.keys->tokens;
    for (int64_t i = 0; i < rows.count; ++i) {
      const int64_t position = side.positions[rows.first + i];
      for (int64_t y = 0; y < rows.problem->segments; ++y)
        for (int64_t j = 0; j < tokens.count[y]; ++j) {
          int64_t delta = position - side.positions[tokens.first[y] + j];
          delta = delta < -side.max_delta ? -side.max_delta : delta > side.max_delta ? side.max_delta : delta;
          slots[i * tokens.width + tokens.column[y] + j] = side.slot_of_delta[delta + side.max_delta];
        }
    }
  }

  static void add_position_bias(const Rows& rows, int64_t head, const int32_t* slots, T* out) {
    const Side& side = *rows.side;
    const Columns& tokens = rows.keys->tokens;
    const int64_t token = side.num_heads * side.num_slots, own = head * side.num_slots;
    // Keys by the block, whose entries of p2c stay in the cache from row to row.
    constexpr int64_t block = kAlignment;
    for (int64_t y = 0; y < rows.problem->segments; ++y)
      for (int64_t j = 0; j < tokens.count[y]; j += block)
        for (int64_t i = 0; i < rows.count; ++i) {
          const int64_t at = i * tokens.width + tokens.column[y] + j;
          const int64_t left = tokens.count[y] - j, count = left < block ? left : block;
          if (side.c2p != nullptr)
            add_entries(side.c2p, side.c2p_element, (rows.first + i) * token + own, 0, slots + at, count, out + at);
          if (side.p2c != nullptr)
            add_entries(
                side.p2c, side.p2c_element, (tokens.first[y] + j) * token + own, token, slots + at, count, out + at);
        }
  }

  static void add_entries(
      const void* table, Element element, int64_t first, int64_t step, const int32_t* slot, int64_t count, T* row) {
    switch (element) {
      case Element::float32: {
        const float* entries = static_cast<const float*>(table) + first;
        for (int64_t j = 0; j < count; ++j) row[j] += log2e * static_cast<T>(entries[j * step + slot[j]]);
        break;
      }
      case Element::bfloat16: {
        const uint16_t* entries = static_cast<const uint16_t*>(table) + first;
        for (int64_t j = 0; j < count; ++j)
          row[j] += log2e * static_cast<T>(from_bfloat16(entries[j * step + slot[j]]));
        break;
      }
      default:
        for (int64_t j = 0; j < count; ++j) row[j] += log2e * number<T>(table, element, first + j * step + slot[j]);
    }
  }

  // Turns a head's scores into numerators of the softmax in place, 0 in padding and behind a causal row's end; writes
  // 1 / denominator of every key segment (rows, segments), and adds the probabilities to `mean` (rows, columns).
  static void softmax(const Rows& rows, T* scores, T* inverse, T* mean) {
    const Problem& problem = *rows.problem;
    const Columns& tokens = rows.keys->tokens;
    const int64_t support = problem.joint ? problem.segments : 1;
    for (int64_t i = 0; i < rows.count; ++i) {
      T* row = scores + i * tokens.width;
      for (int64_t y = 0; y < problem.segments; y += support) {
        Vec most = V::broadcast(-__builtin_inf());
        for (int64_t z = y; z < y + support; ++z)
          most = V::max(most, maximum(row + tokens.column[z], visible(rows, i, z)));
        const Vec offset = V::broadcast(V::maximum(most));
        Vec total = {};
        for (int64_t z = y; z < y + support; ++z) {
          const int64_t padded = tokens.column[z + 1] - tokens.column[z];
          total += exponentials(row + tokens.column[z], visible(rows, i, z), padded, offset);
        }
        const T denominator = V::sum(total);
        const T own = denominator == 0 ? 0 : 1 / denominator;
        for (int64_t z = y; z < y + support; ++z) inverse[i * problem.segments + z] = own;
        const Vec factor = V::broadcast(own);
        T* sum = mean + i * tokens.width;
        for (int64_t j = tokens.column[y]; j < tokens.column[y + support]; j += A::W)
          V::store(sum + j, V::load(sum + j) + V::load(row + j) * factor);
      }
    }
  }

  // Numbers that softmax_of_shared writes for a row.
  static IDRM_INLINE int64_t factors_of_row(int64_t segments) { return 3 * segments + 1; }

  // `softmax` for scores of a shared prefix and of the segments' rests. Numerators have a maximum of their range, so
  // that the prefix keeps its digits for one segment where another's scores lie far above. Writes a row's maxima
  // (1 + segments,) and the factors that make probabilities of the numerators: the prefix's in every segment
  // (segments,), the rests' (segments,).
  static void softmax_of_shared(const Rows& rows, T* scores, T* factors, T* mean) {
    const int64_t segments = rows.problem->segments;
    const Columns& ranges = rows.keys->ranges;
    const Columns& tokens = rows.keys->tokens;
    for (int64_t i = 0; i < rows.count; ++i) {
      T* row = scores + i * ranges.width;
      T* maxima = factors + i * factors_of_row(segments);
      T* of_prefix = maxima + 1 + segments;
      T* of_rest = of_prefix + segments;
      for (int64_t z = 0; z <= segments; ++z) maxima[z] = V::maximum(maximum(row + ranges.column[z], ranges.count[z]));
      const T prefix = range_exponentials(ranges, 0, maxima, row);
      for (int64_t y = 0; y < segments; ++y) of_rest[y] = range_exponentials(ranges, 1 + y, maxima, row);
      const int64_t support = rows.problem->joint ? segments : 1;
      for (int64_t y = 0; y < segments; y += support) {
        T most = maxima[0];
        for (int64_t z = y; z < y + support; ++z) most = maxima[1 + z] > most ? maxima[1 + z] : most;
        const T prefix_power = power(maxima[0] - most);
        T denominator = static_cast<T>(support) * prefix_power * prefix;
        for (int64_t z = y; z < y + support; ++z) denominator += power(maxima[1 + z] - most) * of_rest[z];
        for (int64_t z = y; z < y + support; ++z) {
          of_prefix[z] = prefix_power / denominator;
          of_rest[z] = power(maxima[1 + z] - most) / denominator;
        }
      }
      T* sum = mean + i * tokens.width;
      for (int64_t y = 0; y < segments; ++y) {
        T* own = sum + tokens.column[y];
        add_product(row, ranges.column[1], of_prefix[y], own);
        add_product(
            row + ranges.column[1 + y], ranges.column[2 + y] - ranges.column[1 + y], of_rest[y], own + ranges.count[0]);
      }
    }
  }

  // The numerators of softmax_of_shared again, from its maxima.
  static void numerators_of_shared(const Rows& rows, T* scores, const T* factors) {
    const int64_t segments = rows.problem->segments;
    const Columns& ranges = rows.keys->ranges;
    for (int64_t i = 0; i < rows.count; ++i)
      for (int64_t z = 0; z <= segments; ++z)
        range_exponentials(ranges, z, factors + i * factors_of_row(segments), scores + i * ranges.width);
  }

  static IDRM_INLINE T range_exponentials(const Columns& ranges, int64_t z, const T* maxima, T* row) {
    const int64_t padded = ranges.column[z + 1] - ranges.column[z];
    return V::sum(exponentials(row + ranges.column[z], ranges.count[z], padded, V::broadcast(maxima[z])));
  }

  static IDRM_INLINE T power(T exponent) { return V::exp2(V::broadcast(exponent))[0]; }

  static IDRM_INLINE void add_product(const T* row, int64_t count, T factor, T* sum) {
    const Vec factors = V::broadcast(factor);
    for (int64_t j = 0; j < count; j += A::W) V::store(sum + j, V::load(sum + j) + V::load(row + j) * factors);
  }

  static IDRM_INLINE Vec maximum(const T* row, int64_t count) {
    Vec most = V::broadcast(-__builtin_inf());
    int64_t j = 0;
    for (; j + A::W <= count; j += A::W) most = V::max(most, V::load(row + j));
    if (j < count) most = V::max(most, V::head(V::load(row + j), count - j, -__builtin_inf()));
    return most;
  }

  static IDRM_INLINE Vec exponentials(T* row, int64_t count, int64_t padded, Vec offset) {
    Vec total = {};
    int64_t j = 0;
    for (; j + A::W <= count; j += A::W) {
      const Vec e = V::exp2(V::load(row + j) - offset);
      V::store(row + j, e);
      total += e;
    }
    if (j < count) {
      const Vec e = V::exp2(V::head(V::load(row + j) - offset, count - j, -__builtin_inf()));
      V::store(row + j, e);
      total += e;
      j += A::W;
    }
    for (; j < padded; j += A::W) V::store(row + j, Vec{});
    return total;
  }

  // Adds rows of sums over heads to U (units, unit columns): a unit's keys are summed, and so are its rows; first_unit
  // is U's first. Still to be divided by heads and the unit's rows.
  static void merge(const Rows& rows, const Columns& units, int64_t first_unit, const T* mean, T* merged) {
    const Columns& tokens = rows.keys->tokens;
    const int64_t* offsets = rows.side->unit_offsets;
    int64_t unit = first_unit;
    for (int64_t i = 0; i < rows.count; ++i) {
      while (offsets[unit + 1] <= rows.first + i) ++unit;
      T* out = merged + (unit - first_unit) * units.width;
      const T* row = mean + i * tokens.width;
      if (rows.keys->units_are_tokens) {
        for (int64_t j = 0; j < tokens.width; j += A::W) V::store(out + j, V::load(out + j) + V::load(row + j));
        continue;
      }
      for (int64_t y = 0; y < rows.problem->segments; ++y)
        for (int64_t b = 0; b < units.count[y]; ++b) {
          const int64_t key_unit = units.first[y] + b;
          T sum = 0;
          for (int64_t j = offsets[key_unit]; j < offsets[key_unit + 1]; ++j)
            sum += row[tokens.column[y] + j - tokens.first[y]];
          out[units.column[y] + b] += sum;
        }
    }
  }

  // The last step of `merge`: the mean over heads and over the rows of each unit.
  static void average(const Side& side, int64_t heads, int64_t first_unit, int64_t count, int64_t width, T* merged) {
    for (int64_t a = 0; a < count; ++a) {
      const int64_t tokens = side.unit_offsets[first_unit + a + 1] - side.unit_offsets[first_unit + a];
      const Vec factor = V::broadcast(1 / static_cast<T>(heads * tokens));
      for (int64_t b = 0; b < width; b += A::W)
        V::store(merged + a * width + b, V::load(merged + a * width + b) * factor);
    }
  }
};

}  // namespace IDRM_CAPABILITY
}  // namespace idrm
