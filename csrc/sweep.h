// One strand: chunk after chunk, both models' maps, their distances, and gradients while the numerators are at hand.
#pragma once

#include "comparison.h"
#include "score_gradients.h"

namespace idrm {
namespace IDRM_CAPABILITY {

// What a thread needs for a strand of an example; linear in its tokens but for chunk_rows.
template <class A>
struct Buffers : RowBuffers<A> {
  using T = typename A::T;
  using Unit = typename A::Unit;

  T *numerators, *inverse;                  // (heads, chunk_rows, columns), (heads, chunk_rows, segments)
  T *student_map, *teacher_map;             // (chunk_rows, unit columns)
  T *derivatives;                           // (chunk_rows, columns): d loss / d P of every unit row
  T *delta;                                 // (chunk_rows, segments)
  Unit *query_rows, *d_scores;

  // Places the buffers from `base` on and returns their size in bytes; base may be null, to ask for the size.
  int64_t place(const Problem& problem, const Example& example, char* base) {
    const int64_t rows = example.chunk_rows, segments = problem.segments;
    const int64_t columns = example.student.tokens.width;
    const int64_t heads = problem.needs_grad ? problem.student.num_heads / problem.num_head_groups : 1;
    Layout layout{base};
    layout.put(numerators, heads * rows * columns);
    layout.put(inverse, heads * rows * segments);
    RowBuffers<A>::place(problem, example, layout);
    layout.put(student_map, rows * example.units.width);
    layout.put(teacher_map, rows * example.units.width);
    layout.put(derivatives, rows * columns);
    layout.put(delta, rows * segments);
    layout.put(query_rows, (rows + 1) * aligned(problem.student.head_dim));
    layout.put(d_scores, ScoreGradients<A>::size(rows));
    return layout.bytes;
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
  const Comparison<StudentA, TeacherA> comparison;
  int64_t heads, head_dim, padded_dim, columns;

  Sweep(const Problem& problem, const Strand& strand, char* arena)
      : problem(problem), block(*strand.block), strand(strand), example(*strand.block->example),
        comparison{problem, example, block.group, buffers},
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
    comparison.teacher_map(first, last, buffers.teacher_map);
    const int64_t* offsets = problem.student.unit_offsets;
    const int64_t begin = offsets[first], end = offsets[last];
    clear(buffers.student_map, (last - first) * example.units.width);
    for (int64_t row = begin; row < end; row += example.chunk_rows) {
      const Rows rows = student_rows(row, end);
      numerators_of(rows);
      Maps<StudentA>::merge(rows, example.units, first, buffers.mean, buffers.student_map);
    }
    Maps<StudentA>::average(problem.student, heads, first, last - first, example.units.width, buffers.student_map);
    comparison.distances(first, last, buffers.student_map, buffers.teacher_map);
    if (!block.needs_grad) return;
    derivatives(first, last);
    for (int64_t row = begin; row < end; row += example.chunk_rows) {
      const Rows rows = student_rows(row, end);
      // Only a unit longer than a chunk has several pieces: their numerators are computed again.
      if (end - begin > example.chunk_rows) numerators_of(rows);
      clear_queries(rows);
      for (int64_t head = 0; head < heads; ++head) gradients(rows, first, head);
    }
  }

  Rows student_rows(int64_t row, int64_t end) const {
    const int64_t left = end - row;
    return {&problem, &problem.student, &example.student, row, left < example.chunk_rows ? left : example.chunk_rows};
  }

  // Of q, which has the prefixes of earlier examples once.
  int64_t query_row(const Rows& rows) const {
    return example.student.ranges.first[block.x] + rows.first - block.first_token;
  }

  // Numerators and 1 / denominators of every head of the group, and the sum of its probabilities in `mean`.
  void numerators_of(const Rows& rows) {
    clear(buffers.mean, rows.count * columns);
    const int64_t group_head = first_head(problem, problem.student.num_heads, block.group);
    for (int64_t head = 0; head < heads; ++head) {
      const int64_t kept = problem.needs_grad ? head * example.chunk_rows : 0;
      T* scores = buffers.numerators + kept * columns;
      Packing<StudentA>::query_rows(problem.student, group_head + head, query_row(rows), rows.count, buffers.queries);
      Maps<StudentA>::scores(rows, group_head + head, buffers.queries, nullptr, scores);
      Maps<StudentA>::softmax(rows, scores, buffers.inverse + kept * problem.segments, buffers.mean);
    }
  }

  // d loss / d P of every token of a unit row, by token columns.
  void derivatives(int64_t first, int64_t last) {
    const Columns& units = example.units;
    for (int64_t a = first; a < last; ++a)
      for (int64_t y = 0; y < problem.segments; ++y) {
        const int64_t at = (a - first) * units.width + units.column[y];
        T* s = buffers.student_map + at;
        T* out = buffers.derivatives + (a - first) * columns + example.student.tokens.column[y];
        T* by_unit = example.student.units_are_tokens ? out : s;
        const T factor =
            comparison.coefficient(a, block.x, y, block.total_weight) / comparison.averaged_entries(a);
        comparison.map_gradient(y, factor, s, buffers.teacher_map + at, by_unit);
        if (!example.student.units_are_tokens) comparison.spread(y, by_unit, out);
      }
  }

  T* dq_row(int64_t component, int64_t row) const {
    return reinterpret_cast<T*>(block.dq) +
           (component * block.num_rows + row - block.first_token) * heads * padded_dim;
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
        side, side.q, side.num_heads, head_of_side, query_row(rows), rows.count, buffers.query_rows);
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
    int64_t unit = first_unit;
    auto row_at = [&](int64_t i) {
      while (problem.student.unit_offsets[unit + 1] <= rows.first + i) ++unit;
      const T* derivatives = derived ? buffers.derivatives + (unit - first_unit) * columns + column : nullptr;
      return typename ScoreGradients<StudentA>::Row{numerators_row(head, i) + column, derivatives,
                                                    inverse_row(head, i)[z], buffers.delta[i * problem.segments + z]};
    };
    ScoreGradients<StudentA>::write(buffers.d_scores, rows.count, width, row_at);
  }
};

}  // namespace IDRM_CAPABILITY
}  // namespace idrm
