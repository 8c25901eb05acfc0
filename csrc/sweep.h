// One strand: chunk after chunk, both models' maps, their distances, and gradients while the numerators are at hand.
#pragma once

#include "score_gradients.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace idrm {
namespace IDRM_CAPABILITY {

// What a thread needs for a strand of an example; linear in its tokens but for chunk_rows.
template <class A>
struct Buffers {
  using T = typename A::T;
  using Unit = typename A::Unit;

  T *numerators, *inverse;                  // (heads, chunk_rows, columns), (heads, chunk_rows, segments)
  T *teacher_numerators, *teacher_inverse;  // the same for one head
  T *mean;                                  // (chunk_rows, columns of the wider side)
  T *student_map, *teacher_map;             // (chunk_rows, unit columns)
  T *derivatives;                           // (chunk_rows, columns): d loss / d P of every unit row
  T *delta, *coefficients;                  // (chunk_rows, segments)
  Unit *queries, *query_rows, *d_scores;
  int32_t* slots;                           // (chunk_rows, teacher columns)

  // Lays the buffers out from `base` on and returns their size in bytes; base may be null, to ask for the size.
  int64_t place(const Problem& problem, const Example& example, char* base) {
    const int64_t rows = example.chunk_rows, segments = problem.segments;
    const int64_t columns = example.student.tokens.width;
    const int64_t teacher_columns = problem.packed_teacher() ? example.teacher.tokens.width : 0;
    const int64_t widest = columns > teacher_columns ? columns : teacher_columns;
    const int64_t heads = problem.needs_grad ? problem.student.num_heads / problem.num_head_groups : 1;
    const int64_t dim = problem.student.head_dim, teacher_dim = problem.teacher.head_dim;
    int64_t bytes = 0;
    auto put = [&](auto*& pointer, int64_t count) {
      const int64_t begin = bytes;
      pointer = reinterpret_cast<decltype(pointer + 0)>(base + begin);
      bytes += (count * static_cast<int64_t>(sizeof(*pointer)) + 63) / 64 * 64;
#ifdef __SANITIZE_ADDRESS__
      if (base != nullptr) __asan_unpoison_memory_region(base + begin, bytes - begin);
      if (base != nullptr) __asan_poison_memory_region(base + bytes, 64);
      bytes += 64;
#endif
    };
    put(numerators, heads * rows * columns);
    put(inverse, heads * rows * segments);
    put(teacher_numerators, rows * teacher_columns);
    put(teacher_inverse, rows * segments);
    put(mean, rows * widest);
    put(student_map, rows * example.units.width);
    put(teacher_map, rows * example.units.width);
    put(derivatives, rows * columns);
    put(delta, rows * segments);
    put(coefficients, rows * segments);
    put(queries, rows * (dim > teacher_dim ? dim : teacher_dim));
    put(query_rows, (rows + 1) * aligned(dim));
    put(d_scores, ScoreGradients<A>::size(rows));
    put(slots, problem.bias() ? rows * teacher_columns : 0);
    return bytes;
  }
};

// StudentA and TeacherA differ where a side's dtype asks for another kind of product; both compute in the same T.
template <class StudentA, class TeacherA>
struct Sweep {
  using T = typename StudentA::T;
  using Unit = typename StudentA::Unit;
  using V = typename StudentA::V;
  using Vec = typename StudentA::Vec;
  static constexpr int W = StudentA::W;

  const Problem& problem;
  const Block& block;
  const Strand& strand;
  const Example& example;
  Buffers<StudentA> buffers;
  int64_t heads, head_dim, padded_dim, columns;

  Sweep(const Problem& problem, const Strand& strand, char* arena)
      : problem(problem), block(*strand.block), strand(strand), example(*strand.block->example),
        heads(problem.student.num_heads / problem.num_head_groups), head_dim(problem.student.head_dim),
        padded_dim(aligned(head_dim)), columns(example.student.tokens.width) {
    buffers.place(problem, example, arena);
  }

  void run() {
    if (block.needs_grad)
      __builtin_memset(
          strand.dk, 0,
          block.key_components * kv_heads(problem, block.group).count * columns * padded_dim * sizeof(T));
    for (int64_t i = 0; i < strand.num_chunks; ++i) chunk(strand.chunk_units[i], strand.chunk_units[i + 1]);
  }

 private:
  void chunk(int64_t first, int64_t last) {
    teacher_map(first, last);
    const int64_t* offsets = problem.student.unit_offsets;
    const int64_t begin = offsets[first], end = offsets[last];
    clear(buffers.student_map, (last - first) * example.units.width);
    for (int64_t row = begin; row < end; row += example.chunk_rows) {
      const Rows rows = student_rows(row, end);
      numerators_of(rows);
      Maps<StudentA>::merge(rows, example.units, first, buffers.mean, buffers.student_map);
    }
    Maps<StudentA>::average(problem.student, heads, first, last - first, example.units.width, buffers.student_map);
    distances(first, last);
    if (!block.needs_grad) return;
    coefficients(first, last);
    derivatives(first, last);
    for (int64_t row = begin; row < end; row += example.chunk_rows) {
      const Rows rows = student_rows(row, end);
      // Only a unit longer than a chunk has several pieces: their numerators are computed again.
      if (end - begin > example.chunk_rows) numerators_of(rows);
      clear_queries(rows);
      for (int64_t head = 0; head < heads; ++head) gradients(rows, first, head);
    }
  }

  static void clear(T* data, int64_t count) { __builtin_memset(data, 0, count * sizeof(T)); }

  Rows student_rows(int64_t row, int64_t end) const {
    const int64_t left = end - row;
    return {&problem, &problem.student, &example.student, row, left < example.chunk_rows ? left : example.chunk_rows};
  }

  // Numerators and 1 / denominators of every head of the group, and the sum of its probabilities in `mean`.
  void numerators_of(const Rows& rows) {
    clear(buffers.mean, rows.count * columns);
    const int64_t group_head = first_head(problem, problem.student.num_heads, block.group);
    for (int64_t head = 0; head < heads; ++head) {
      const int64_t kept = problem.needs_grad ? head * example.chunk_rows : 0;
      T* scores = buffers.numerators + kept * columns;
      Packing<StudentA>::query_rows(problem.student, group_head + head, rows.first, rows.count, buffers.queries);
      Maps<StudentA>::scores(rows, group_head + head, buffers.queries, nullptr, scores);
      Maps<StudentA>::softmax(rows, scores, buffers.inverse + kept * problem.segments, buffers.mean);
    }
  }

  void teacher_map(int64_t first, int64_t last) {
    clear(buffers.teacher_map, (last - first) * example.units.width);
    if (!problem.packed_teacher()) {
      stored_map(first, last);
      return;
    }
    const Side& side = problem.teacher;
    const int64_t end = side.unit_offsets[last], width = example.teacher.tokens.width;
    const int64_t teacher_heads = side.num_heads / problem.num_head_groups;
    const int64_t group_head = first_head(problem, side.num_heads, block.group);
    auto* queries = reinterpret_cast<typename TeacherA::Unit*>(buffers.queries);
    for (int64_t row = side.unit_offsets[first]; row < end; row += example.chunk_rows) {
      const int64_t left = end - row;
      const Rows rows{&problem, &side, &example.teacher, row, left < example.chunk_rows ? left : example.chunk_rows};
      clear(buffers.mean, rows.count * width);
      if (problem.bias()) Maps<TeacherA>::find_slots(rows, buffers.slots);
      for (int64_t head = group_head; head < group_head + teacher_heads; ++head) {
        Packing<TeacherA>::query_rows(side, head, rows.first, rows.count, queries);
        Maps<TeacherA>::scores(rows, head, queries, buffers.slots, buffers.teacher_numerators);
        Maps<TeacherA>::softmax(rows, buffers.teacher_numerators, buffers.teacher_inverse, buffers.mean);
      }
      Maps<TeacherA>::merge(rows, example.units, first, buffers.mean, buffers.teacher_map);
    }
    Maps<TeacherA>::average(side, teacher_heads, first, last - first, example.units.width, buffers.teacher_map);
  }

  void stored_map(int64_t first, int64_t last) {
    const Columns& units = example.units;
    const int64_t map = (example.index * problem.num_head_groups + block.group) * problem.max_units;
    for (int64_t a = first; a < last; ++a)
      for (int64_t y = 0; y < problem.segments; ++y)
        read_row(
            problem.maps, problem.maps_element,
            (map + a - units.first[0]) * problem.max_units + units.first[y] - units.first[0], units.count[y],
            units.count[y], buffers.teacher_map + (a - first) * units.width + units.column[y]);
  }

  T* distance_row(int64_t unit) const {
    return static_cast<T*>(problem.distances) + (block.group * problem.total_units + unit) * problem.segments;
  }

  void distances(int64_t first, int64_t last) {
    const Columns& units = example.units;
    for (int64_t a = first; a < last; ++a)
      for (int64_t y = 0; y < problem.segments; ++y) {
        const int64_t at = (a - first) * units.width + units.column[y];
        const T* s = buffers.student_map + at;
        const T* t = buffers.teacher_map + at;
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

  static T logarithm(T x) {
    if constexpr (sizeof(T) == 4) return __builtin_logf(x);
    else return __builtin_log(x);
  }
  static T square_root(T x) {
    if constexpr (sizeof(T) == 4) return __builtin_sqrtf(x);
    else return __builtin_sqrt(x);
  }

  // d loss / d distance, but for the factor of a block that is known after its last row.
  void coefficients(int64_t first, int64_t last) {
    for (int64_t a = first; a < last; ++a)
      for (int64_t y = 0; y < problem.segments; ++y) {
        T& value = buffers.coefficients[(a - first) * problem.segments + y];
        if (problem.task == Task::distance_backward) {
          const int64_t row = block.group * problem.total_units + a;
          value = static_cast<const T*>(problem.coefficients)[row * problem.segments + y];
          continue;
        }
        const T weight = problem.row_weights == nullptr ? 1 : static_cast<const T*>(problem.row_weights)[a];
        const T distance = distance_row(a)[y];
        const T total = static_cast<T>(block.total_weight);
        if (problem.reduction == Reduction::frobenius) value = weight;
        else if (!(total > 0)) value = 0;
        else if (problem.reduction == Reduction::row_sq) value = weight / total;
        else value = distance > 0 ? static_cast<T>(0.5) * weight / square_root(distance) / total : 0;
        value *= static_cast<T>(problem.block_weight(block.x, y));
      }
  }

  // d loss / d P of every token of a unit row, by token columns.
  void derivatives(int64_t first, int64_t last) {
    const Columns& units = example.units;
    const Columns& tokens = example.student.tokens;
    const int64_t* offsets = problem.student.unit_offsets;
    for (int64_t a = first; a < last; ++a)
      for (int64_t y = 0; y < problem.segments; ++y) {
        const int64_t at = (a - first) * units.width + units.column[y];
        T* s = buffers.student_map + at;
        const T* t = buffers.teacher_map + at;
        const T factor = buffers.coefficients[(a - first) * problem.segments + y] /
                         static_cast<T>(heads * (offsets[a + 1] - offsets[a]));
        T* out = buffers.derivatives + (a - first) * columns + tokens.column[y];
        const int64_t width = units.column[y + 1] - units.column[y];
        T* by_unit = example.student.units_are_tokens ? out : s;
        if (problem.kl) {
          for (int64_t b = 0; b < width; ++b)
            by_unit[b] = factor * (1 - (s[b] > static_cast<T>(1e-30) ? t[b] / s[b] : 0));
        } else {
          const Vec twice = V::broadcast(2 * factor);
          for (int64_t b = 0; b < width; b += W) V::store(by_unit + b, twice * (V::load(s + b) - V::load(t + b)));
        }
        if (example.student.units_are_tokens) continue;
        for (int64_t b = 0; b < units.count[y]; ++b) {
          const int64_t unit = units.first[y] + b;
          for (int64_t j = offsets[unit]; j < offsets[unit + 1]; ++j) out[j - tokens.first[y]] = by_unit[b];
        }
        for (int64_t j = tokens.count[y]; j < tokens.column[y + 1] - tokens.column[y]; ++j) out[j] = 0;
      }
  }

  T* dq_row(int64_t component, int64_t row) const {
    return reinterpret_cast<T*>(block.dq) +
           (component * block.num_rows + row - block.first_row) * heads * padded_dim;
  }

  void clear_queries(const Rows& rows) {
    for (int64_t component = 0; component < block.query_components; ++component)
      clear(dq_row(component, rows.first), rows.count * heads * padded_dim);
  }

  // Adds one head's part of dq and dk, without softmax_scale.
  void gradients(const Rows& rows, int64_t first_unit, int64_t head) {
    const Side& side = problem.student;
    const Columns& tokens = example.student.tokens;
    const int64_t head_of_side = first_head(problem, side.num_heads, block.group) + head;
    const int64_t kv_head = head_of_side / (side.num_heads / side.num_kv_heads);
    const KvHeads own = kv_heads(problem, block.group);
    const Unit* keys = reinterpret_cast<const Unit*>(example.student.natural + kv_head * example.student.natural_bytes);
    Packing<StudentA>::natural_rows(
        side, side.q, side.num_heads, head_of_side, rows.first, rows.count, buffers.query_rows);
    for (int64_t component = 0; component < block.query_components; ++component) {
      const bool apart = block.query_components > 1;
      if (apart && problem.block_weight(block.x, component) == 0) continue;
      const int64_t maps_begin = apart ? component : 0, maps_end = apart ? component + 1 : problem.segments;
      deltas(rows, first_unit, head, maps_begin, maps_end);
      const int64_t part = block.key_components > 1 ? component : 0;
      T* dk = reinterpret_cast<T*>(strand.dk) + (part * own.count + kv_head - own.first) * columns * padded_dim;
      T* dq = dq_row(component, rows.first) + head * padded_dim;
      // Under "joint" the derivatives by one segment's probabilities reach all scores through the softmax.
      for (int64_t z = problem.joint ? 0 : maps_begin; z < (problem.joint ? problem.segments : maps_end); ++z)
        for (int64_t column = tokens.column[z]; column < tokens.column[z + 1]; column += kPanel) {
          const int64_t left = tokens.column[z + 1] - column, width = left < kPanel ? left : kPanel;
          score_gradients(rows, first_unit, head, z, column, width, z >= maps_begin && z < maps_end);
          product<StudentA, true>(
              rows.count, padded_dim, width / StudentA::depth_of_unit,
              ScoreGradients<StudentA>::by_row(buffers.d_scores),
              {keys + column / StudentA::depth_of_unit * padded_dim, 0, padded_dim}, dq, heads * padded_dim);
          product<StudentA, true>(
              width, padded_dim, units_of<StudentA>(rows.count),
              ScoreGradients<StudentA>::by_key(buffers.d_scores, rows.count), {buffers.query_rows, 0, padded_dim},
              dk + column * padded_dim, padded_dim);
        }
    }
  }

  const T* numerators_row(int64_t head, int64_t row) const {
    return buffers.numerators + (head * example.chunk_rows + row) * columns;
  }
  const T* inverse_row(int64_t head, int64_t row) const {
    return buffers.inverse + (head * example.chunk_rows + row) * problem.segments;
  }

  // delta = sum over a softmax's support of P dP, with dP confined to some key segments.
  void deltas(const Rows& rows, int64_t first_unit, int64_t head, int64_t maps_begin, int64_t maps_end) {
    const Columns& tokens = example.student.tokens;
    int64_t unit = first_unit;
    for (int64_t i = 0; i < rows.count; ++i) {
      while (problem.student.unit_offsets[unit + 1] <= rows.first + i) ++unit;
      const T* p = numerators_row(head, i);
      const T* dp = buffers.derivatives + (unit - first_unit) * columns;
      T* delta = buffers.delta + i * problem.segments;
      if (problem.joint) {
        const T value = inner(p, dp, tokens.column[maps_begin], tokens.column[maps_end]) * inverse_row(head, i)[0];
        for (int64_t z = 0; z < problem.segments; ++z) delta[z] = value;
      } else {
        for (int64_t z = maps_begin; z < maps_end; ++z)
          delta[z] = inner(p, dp, tokens.column[z], tokens.column[z + 1]) * inverse_row(head, i)[z];
      }
    }
  }

  static T inner(const T* a, const T* b, int64_t begin, int64_t end) {
    Vec sum = {};
    for (int64_t j = begin; j < end; j += W) sum += V::load(a + j) * V::load(b + j);
    return V::sum(sum);
  }

  void score_gradients(
      const Rows& rows, int64_t first_unit, int64_t head, int64_t z, int64_t column, int64_t width, bool derived) {
    using Row = typename ScoreGradients<StudentA>::Row;
    int64_t unit = first_unit;
    auto row_at = [&](int64_t i) {
      while (problem.student.unit_offsets[unit + 1] <= rows.first + i) ++unit;
      return Row{
          numerators_row(head, i) + column,
          derived ? buffers.derivatives + (unit - first_unit) * columns + column : nullptr, inverse_row(head, i)[z],
          buffers.delta[i * problem.segments + z]};
    };
    for (int64_t i = 0; i < rows.count; i += 2) {
      const Row even = row_at(i);
      const bool both = i + 1 < rows.count;
      const Row odd = both ? row_at(i + 1) : even;
      ScoreGradients<StudentA>::write(buffers.d_scores, rows.count, i, even, both ? &odd : nullptr, width);
    }
  }
};

}  // namespace IDRM_CAPABILITY
}  // namespace idrm
