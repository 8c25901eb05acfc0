// What both sweeps do with a chunk of unit rows beside the student's map: the teacher's map, the distances of the two,
// and the derivatives of these.
#pragma once

#include "attention_maps.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace idrm {
namespace IDRM_CAPABILITY {

// Lays buffers out one behind the other, from `base` on; base may be null, to ask for the size alone.
struct Layout {
  char* base;
  int64_t bytes = 0;

  template <class P>
  void put(P*& pointer, int64_t count) {
    const int64_t begin = bytes;
    pointer = reinterpret_cast<P*>(base + begin);
    bytes += (count * static_cast<int64_t>(sizeof(P)) + 63) / 64 * 64;
#ifdef __SANITIZE_ADDRESS__
    if (base != nullptr) __asan_unpoison_memory_region(base + begin, bytes - begin);
    if (base != nullptr) __asan_poison_memory_region(base + bytes, 64);
    bytes += 64;
#endif
  }
};

// What a thread needs for the rows of one head of either side.
template <class A>
struct RowBuffers {
  using T = typename A::T;
  using Unit = typename A::Unit;

  T *teacher_numerators, *teacher_inverse;  // (chunk_rows, teacher columns), (chunk_rows, segments)
  T* mean;                                  // (chunk_rows, columns of the wider side)
  Unit* queries;
  int32_t* slots;                           // (chunk_rows, teacher columns)

  void place(const Problem& problem, const Example& example, Layout& layout) {
    const int64_t rows = example.chunk_rows, columns = example.student.tokens.width;
    const int64_t teacher_columns = problem.packed_teacher() ? example.teacher.tokens.width : 0;
    const int64_t dim = problem.student.head_dim, teacher_dim = problem.teacher.head_dim;
    layout.put(teacher_numerators, rows * teacher_columns);
    layout.put(teacher_inverse, rows * problem.segments);
    // The vectors that end a segment's rest may reach beyond a row.
    layout.put(mean, rows * (columns > teacher_columns ? columns : teacher_columns) + kAlignment);
    layout.put(queries, rows * (dim > teacher_dim ? dim : teacher_dim));
    layout.put(slots, problem.bias() ? rows * teacher_columns : 0);
  }
};

template <class T>
IDRM_INLINE void clear(T* data, int64_t count) {
  __builtin_memset(data, 0, count * sizeof(T));
}

// StudentA and TeacherA differ where a side's dtype asks for another kind of product; both compute in the same T.
template <class StudentA, class TeacherA>
struct Comparison {
  using T = typename StudentA::T;
  using V = typename StudentA::V;
  using Vec = typename StudentA::Vec;
  static constexpr int W = StudentA::W;

  const Problem& problem;
  const Example& example;
  int64_t group;
  const RowBuffers<StudentA>& buffers;

  // The merged and averaged map of unit rows [first, last) as (units, unit columns).
  void teacher_map(int64_t first, int64_t last, T* map) const {
    clear(map, (last - first) * example.units.width);
    if (!problem.packed_teacher()) {
      stored_map(first, last, map);
      return;
    }
    const Side& side = problem.teacher;
    const int64_t end = side.unit_offsets[last], width = example.teacher.tokens.width;
    const int64_t heads = side.num_heads / problem.num_head_groups;
    const int64_t group_head = first_head(problem, side.num_heads, group);
    auto* queries = reinterpret_cast<typename TeacherA::Unit*>(buffers.queries);
    for (int64_t row = side.unit_offsets[first]; row < end; row += example.chunk_rows) {
      const int64_t left = end - row, count = left < example.chunk_rows ? left : example.chunk_rows;
      const Rows rows{&problem, &side, &example.teacher, row, count};
      clear(buffers.mean, rows.count * width);
      if (problem.bias()) Maps<TeacherA>::find_slots(rows, buffers.slots);
      for (int64_t head = group_head; head < group_head + heads; ++head) {
        Packing<TeacherA>::query_rows(side, head, row, count, queries);
        Maps<TeacherA>::scores(rows, head, queries, buffers.slots, buffers.teacher_numerators);
        Maps<TeacherA>::softmax(rows, buffers.teacher_numerators, buffers.teacher_inverse, buffers.mean);
      }
      Maps<TeacherA>::merge(rows, example.units, first, buffers.mean, map);
    }
    Maps<TeacherA>::average(side, heads, first, last - first, example.units.width, map);
  }

  // The distances of unit rows [first, last) of the student's and the teacher's map.
  void distances(int64_t first, int64_t last, const T* student, const T* teacher) const {
    const Columns& units = example.units;
    for (int64_t a = first; a < last; ++a)
      for (int64_t y = 0; y < problem.segments; ++y) {
        const int64_t at = (a - first) * units.width + units.column[y];
        const T* s = student + at;
        const T* t = teacher + at;
        Vec sum = {};
        if (problem.kl) {
          // The logarithm of a quotient near 1 and a difference of close numbers lose no bits to cancellation.
          T total = 0;
          for (int64_t b = 0; b < units.count[y]; ++b) {
            const T quotient = t[b] / (s[b] < static_cast<T>(1e-30) ? static_cast<T>(1e-30) : s[b]);
            total += (t[b] == 0 ? 0 : t[b] * logarithm(quotient)) + (s[b] - t[b]);
          }
          sum[0] = total;
        } else {
          for (int64_t b = 0; b < units.column[y + 1] - units.column[y]; b += W) {
            const Vec difference = V::load(s + b) - V::load(t + b);
            sum += difference * difference;
          }
        }
        const T value = V::sum(sum);
        distance_row(a)[y] = value < 0 ? 0 : value;
      }
  }

  // d loss / d distance of unit a of segment x, but for the factor of a block that is known after its last row.
  T coefficient(int64_t a, int64_t x, int64_t y, double total_weight) const {
    if (problem.task == Task::distance_backward) {
      const int64_t row = group * problem.total_units + a;
      return static_cast<const T*>(problem.coefficients)[row * problem.segments + y];
    }
    const T weight = problem.row_weights == nullptr ? 1 : static_cast<const T*>(problem.row_weights)[a];
    const T distance = distance_row(a)[y];
    const T total = static_cast<T>(total_weight);
    T value = 0;
    if (problem.reduction == Reduction::frobenius) value = weight;
    else if (!(total > 0)) value = 0;
    else if (problem.reduction == Reduction::row_sq) value = weight / total;
    else value = distance > 0 ? static_cast<T>(0.5) * weight / square_root(distance) / total : 0;
    return value * static_cast<T>(problem.block_weight(x, y));
  }

  // Entries of P, of all heads and tokens of a unit, whose mean an entry of the map is.
  T averaged_entries(int64_t unit) const {
    const int64_t* offsets = problem.student.unit_offsets;
    const int64_t heads = problem.student.num_heads / problem.num_head_groups;
    return static_cast<T>(heads * (offsets[unit + 1] - offsets[unit]));
  }

  // factor * d distance / d map of a row and the units of one segment, padding included; `out` may be `teacher`.
  void map_gradient(int64_t y, T factor, const T* student, const T* teacher, T* out) const {
    const int64_t width = example.units.column[y + 1] - example.units.column[y];
    if (problem.kl) {
      for (int64_t b = 0; b < width; ++b)
        out[b] = factor * (1 - (student[b] > static_cast<T>(1e-30) ? teacher[b] / student[b] : 0));
    } else {
      const Vec twice = V::broadcast(2 * factor);
      for (int64_t b = 0; b < width; b += W)
        V::store(out + b, twice * (V::load(student + b) - V::load(teacher + b)));
    }
  }

  // From the units of one segment to its tokens, padding included.
  void spread(int64_t y, const T* by_unit, T* out) const {
    const Columns& units = example.units;
    const Columns& tokens = example.student.tokens;
    const int64_t* offsets = problem.student.unit_offsets;
    for (int64_t b = 0; b < units.count[y]; ++b) {
      const int64_t unit = units.first[y] + b;
      for (int64_t j = offsets[unit]; j < offsets[unit + 1]; ++j) out[j - tokens.first[y]] = by_unit[b];
    }
    for (int64_t j = tokens.count[y]; j < tokens.column[y + 1] - tokens.column[y]; ++j) out[j] = 0;
  }

 private:
  void stored_map(int64_t first, int64_t last, T* map) const {
    const Columns& units = example.units;
    const int64_t own = (example.index * problem.num_head_groups + group) * problem.max_units;
    for (int64_t a = first; a < last; ++a)
      for (int64_t y = 0; y < problem.segments; ++y)
        read_row(
            problem.maps, problem.maps_element,
            (own + a - units.first[0]) * problem.max_units + units.first[y] - units.first[0], units.count[y],
            units.count[y], map + (a - first) * units.width + units.column[y]);
  }

  T* distance_row(int64_t unit) const {
    return static_cast<T*>(problem.distances) + (group * problem.total_units + unit) * problem.segments;
  }

  static T logarithm(T x) {
    if constexpr (sizeof(T) == 4) return __builtin_logf(x);
    else return __builtin_log(x);
  }
  static T square_root(T x) {
    if constexpr (sizeof(T) == 4) return __builtin_sqrtf(x);
    else return __builtin_sqrt(x);
  }
};

}  // namespace IDRM_CAPABILITY
}  // namespace idrm
