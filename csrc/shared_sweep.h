// An example whose segments share a prefix: a prefix row's scores stand for all query segments, a prefix key's for all key
// segments. Its chunks are compared first; when the coefficients of their rows are known, gradients follow, a head at a
// time over all chunks.
#pragma once

#include "comparison.h"
#include "score_gradients.h"

namespace idrm {
namespace IDRM_CAPABILITY {

// What a thread needs for a chunk.
template <class A>
struct SharedBuffers : RowBuffers<A> {
  using T = typename A::T;
  using Unit = typename A::Unit;

  T* numerators;  // (chunk_rows, columns) of one head
  T* maps;        // SharedMaps of a chunk that are not kept
  T* delta;       // (chunk_rows, segments)
  T* dq;          // (chunk_rows, padded head_dim)
  Unit *query_rows, *d_scores;

  int64_t place(const Problem& problem, const Example& example, char* base);
};

// The maps of a chunk: the student's, and one of the teacher's for every query segment that its rows lie in. The first of
// these becomes d loss / d map, which is spread to tokens behind them where units are merged.
template <class T>
struct SharedMaps {
  int64_t units, columns, queries, token_columns;  // token_columns: 0 where units are tokens

  SharedMaps(const Problem& problem, const Example& example, int64_t units, bool prefix)
      : units(units), columns(example.units.width), queries(prefix ? problem.segments : 1),
        token_columns(example.student.units_are_tokens ? 0 : example.student.tokens.width) {}

  T* student(T* maps) const { return maps; }
  T* teacher(T* maps, int64_t query) const { return maps + (1 + query) * units * columns; }
  T* derivatives(T* maps) const { return teacher(maps, token_columns > 0 ? queries : 0); }
  // The vectors that end a segment's rest may reach beyond a row.
  T* slack(T* maps) const { return teacher(maps, queries) + units * token_columns; }
  int64_t size() const { return (1 + queries) * units * columns + units * token_columns + kAlignment; }
};

template <class A>
int64_t SharedBuffers<A>::place(const Problem& problem, const Example& example, char* base) {
  const int64_t rows = example.chunk_rows;
  Layout layout{base};
  RowBuffers<A>::place(problem, example, layout);
  layout.put(numerators, rows * example.student.ranges.width);
  layout.put(maps, SharedMaps<T>(problem, example, rows, true).size());
  layout.put(delta, rows * problem.segments);
  layout.put(dq, rows * aligned(problem.student.head_dim));
  layout.put(query_rows, (rows + 1) * aligned(problem.student.head_dim));
  layout.put(d_scores, ScoreGradients<A>::size(rows));
  return layout.bytes;
}

template <class StudentA, class TeacherA>
struct SharedSweep {
  using T = typename StudentA::T;
  using Unit = typename StudentA::Unit;
  using V = typename StudentA::V;
  using Vec = typename StudentA::Vec;
  static constexpr int W = StudentA::W;

  const Problem& problem;
  const SharedBlock& block;
  const SharedChunk& chunk;
  const Example& example;
  const Columns &tokens, &ranges;
  const int64_t segments, heads, padded_dim;
  const SharedMaps<T> layout;
  T* maps;
  SharedBuffers<StudentA> buffers;
  const Comparison<StudentA, TeacherA> comparison;

  SharedSweep(const Problem& problem, const SharedBlock& block, const SharedChunk& chunk, char* arena)
      : problem(problem), block(block), chunk(chunk), example(*block.example), tokens(example.student.tokens),
        ranges(example.student.ranges), segments(problem.segments),
        heads(problem.student.num_heads / problem.num_head_groups), padded_dim(aligned(problem.student.head_dim)),
        layout(problem, example, chunk.last - chunk.first, chunk.range == 0),
        comparison{problem, example, block.group, buffers} {
    buffers.place(problem, example, arena);
    maps = chunk.maps == nullptr ? buffers.maps : reinterpret_cast<T*>(chunk.maps);
  }

  // Maps and distances of the chunk's rows, and the factors of their softmax.
  void compare() {
    for (int64_t query = 0; query < layout.queries; ++query)
      comparison.teacher_map(unit_in(query, chunk.first), unit_in(query, chunk.last), layout.teacher(maps, query));
    T* student = layout.student(maps);
    clear(student, layout.units * layout.columns);
    for_pieces([&](const Rows& rows, int64_t done) {
      clear(buffers.mean, rows.count * tokens.width + kAlignment);
      for (int64_t head = 0; head < heads; ++head) {
        T* scores = numerators_row(head, done);
        find_scores(rows, head, scores);
        Maps<StudentA>::softmax_of_shared(rows, scores, factors_row(rows, head), buffers.mean);
      }
      Maps<StudentA>::merge(rows, example.units, chunk.first, buffers.mean, student);
    });
    Maps<StudentA>::average(problem.student, heads, chunk.first, layout.units, layout.columns, student);
    for (int64_t query = 0; query < layout.queries; ++query)
      comparison.distances(
          unit_in(query, chunk.first), unit_in(query, chunk.last), student, layout.teacher(maps, query));
  }

  // d loss / d map of the chunk's rows, summed over their query segments, by tokens; its maps must be kept.
  void differentiate() {
    const Columns& units = example.units;
    for (int64_t row = 0; row < layout.units; ++row)
      for (int64_t y = 0; y < segments; ++y) {
        const int64_t at = row * layout.columns + units.column[y];
        T* out = layout.teacher(maps, 0) + at;
        for (int64_t query = 0; query < layout.queries; ++query) {
          const int64_t x = segment_of(query), unit = unit_in(query, chunk.first + row);
          const T coefficient = comparison.coefficient(unit, x, y, block.total_weights[x]) *
                                static_cast<T>(block.factors[x * segments + y]);
          const T* student = layout.student(maps) + at;
          const T* teacher = layout.teacher(maps, query) + at;
          if (query == 0) comparison.template derivative<false>(unit, y, coefficient, student, teacher, out);
          else comparison.template derivative<true>(unit, y, coefficient, student, teacher, out);
        }
        if (layout.token_columns > 0)
          comparison.spread(y, out, layout.derivatives(maps) + row * layout.token_columns + tokens.column[y]);
      }
    clear(layout.slack(maps), kAlignment);
  }

  // Writes dq of the chunk's rows and the group's query heads that read a kv head, and adds to dk (columns, padded
  // head_dim) of it, the latter without softmax_scale.
  void add_gradients(int64_t kv_head, T* dk) {
    const Side& side = problem.student;
    const int64_t sharing = side.num_heads / side.num_kv_heads;
    const int64_t group_head = first_head(problem, side.num_heads, block.group);
    const Unit* keys = reinterpret_cast<const Unit*>(example.student.natural + kv_head * example.student.natural_bytes);
    for_pieces([&](const Rows& rows, int64_t done) {
      for (int64_t head = 0; head < heads; ++head) {
        if ((group_head + head) / sharing != kv_head) continue;
        const T* factors = factors_row(rows, head);
        T* numerators = numerators_row(head, done);
        if (chunk.numerators == nullptr) {
          find_scores(rows, head, numerators);
          Maps<StudentA>::numerators_of_shared(rows, numerators, factors);
        }
        Packing<StudentA>::natural_rows(
            side, side.q, side.num_heads, group_head + head, query_row(rows), rows.count, buffers.query_rows);
        find_deltas(rows, numerators, factors);
        clear(buffers.dq, rows.count * padded_dim);
        for (int64_t z = 0; z <= segments; ++z) {
          if (z > 0 && !reaches(z - 1)) continue;
          for (int64_t column = ranges.column[z]; column < ranges.column[z + 1]; column += kPanel) {
            const int64_t left = ranges.column[z + 1] - column, width = left < kPanel ? left : kPanel;
            find_score_gradients(rows, z, column, width, numerators, factors);
            product<StudentA, true>(
                rows.count, padded_dim, width / StudentA::depth_of_unit,
                ScoreGradients<StudentA>::by_row(buffers.d_scores),
                {keys + column / StudentA::depth_of_unit * padded_dim, 0, padded_dim}, buffers.dq, padded_dim);
            product<StudentA, true>(
                width, padded_dim, units_of<StudentA>(rows.count),
                ScoreGradients<StudentA>::by_key(buffers.d_scores, rows.count), {buffers.query_rows, 0, padded_dim},
                dk + column * padded_dim, padded_dim);
          }
        }
        write_queries(rows, group_head + head);
      }
    });
  }

 private:
  // The rows' query segments: all of them for the prefix.
  int64_t segment_of(int64_t query) const { return chunk.range == 0 ? query : chunk.range - 1; }

  // A unit of the chunk as one of a query segment.
  int64_t unit_in(int64_t query, int64_t unit) const {
    return unit - example.units.first[segment_of(0)] + example.units.first[segment_of(query)];
  }

  // Calls work(rows, rows of the chunk before them): at most chunk_rows tokens, of which only a long unit has more.
  template <class Work>
  void for_pieces(const Work& work) {
    const int64_t* offsets = problem.student.unit_offsets;
    const int64_t begin = offsets[chunk.first], end = offsets[chunk.last];
    for (int64_t token = begin; token < end; token += example.chunk_rows) {
      const int64_t left = end - token, count = left < example.chunk_rows ? left : example.chunk_rows;
      work(Rows{&problem, &problem.student, &example.student, token, count}, token - begin);
    }
  }

  // The first one's row of q.
  int64_t query_row(const Rows& rows) const {
    const int64_t before = chunk.range == 0 ? 0 : ranges.count[0];
    return ranges.first[chunk.range] + rows.first - tokens.first[segment_of(0)] - before;
  }

  // Kept for all heads and rows of the chunk, or one head's piece.
  T* numerators_row(int64_t head, int64_t row) const {
    if (chunk.numerators == nullptr) return buffers.numerators;
    const int64_t* offsets = problem.student.unit_offsets;
    const int64_t rows = offsets[chunk.last] - offsets[chunk.first];
    return reinterpret_cast<T*>(chunk.numerators) + (head * rows + row) * ranges.width;
  }

  // Of Maps::softmax_of_shared: (heads, rows of the example, ...).
  T* factors_row(const Rows& rows, int64_t head) const {
    const int64_t row = head * example.num_rows + query_row(rows) - ranges.first[0];
    return reinterpret_cast<T*>(block.softmax) + row * Maps<StudentA>::factors_of_row(segments);
  }

  void find_scores(const Rows& rows, int64_t head, T* scores) {
    const int64_t head_of_side = first_head(problem, problem.student.num_heads, block.group) + head;
    Packing<StudentA>::query_rows(problem.student, head_of_side, query_row(rows), rows.count, buffers.queries);
    Maps<StudentA>::scores(rows, head_of_side, buffers.queries, nullptr, scores);
  }

  // Whether the scores of a key segment's rest have a gradient.
  bool reaches(int64_t y) const {
    return problem.joint || chunk.range == 0 || problem.block_weight(segment_of(0), y) != 0;
  }

  const T* derivatives_row(int64_t unit) const {
    return layout.derivatives(maps) + (unit - chunk.first) * tokens.width;
  }

  // delta = sum over a softmax's support of P dP, for every key segment.
  void find_deltas(const Rows& rows, const T* numerators, const T* factors) {
    int64_t unit = chunk.first;
    for (int64_t i = 0; i < rows.count; ++i) {
      while (problem.student.unit_offsets[unit + 1] <= rows.first + i) ++unit;
      const T* n = numerators + i * ranges.width;
      const T* of_prefix = factors + i * Maps<StudentA>::factors_of_row(segments) + 1 + segments;
      const T* of_rest = of_prefix + segments;
      const T* dp = derivatives_row(unit);
      T* delta = buffers.delta + i * segments;
      T total = 0;
      for (int64_t y = 0; y < segments; ++y) {
        const T* own = dp + tokens.column[y];
        delta[y] = inner(n, own, ranges.column[1]) * of_prefix[y] +
                   inner(n + ranges.column[1 + y], own + ranges.count[0], ranges.column[2 + y] - ranges.column[1 + y]) *
                       of_rest[y];
        total += delta[y];
      }
      if (problem.joint)
        for (int64_t y = 0; y < segments; ++y) delta[y] = total;
    }
  }

  static T inner(const T* a, const T* b, int64_t count) {
    Vec sum = {};
    for (int64_t j = 0; j < count; j += W) sum += V::load(a + j) * V::load(b + j);
    return V::sum(sum);
  }

  // A prefix key has part in every key segment's map.
  struct PrefixRow {
    const T *numerators, *derivatives, *factors, *delta;
    const int64_t* column;
    int64_t segments;

    IDRM_INLINE Vec at(int64_t j) const {
      Vec sum = V::broadcast(factors[0]) * (V::load(derivatives + column[0] + j) - V::broadcast(delta[0]));
      for (int64_t y = 1; y < segments; ++y)
        sum += V::broadcast(factors[y]) * (V::load(derivatives + column[y] + j) - V::broadcast(delta[y]));
      return V::load(numerators + j) * sum;
    }
  };

  void find_score_gradients(
      const Rows& rows, int64_t z, int64_t column, int64_t width, const T* numerators, const T* factors) {
    using Gradients = ScoreGradients<StudentA>;
    int64_t unit = chunk.first;
    auto derivatives = [&](int64_t i) {
      while (problem.student.unit_offsets[unit + 1] <= rows.first + i) ++unit;
      return derivatives_row(unit);
    };
    auto own_factors = [&](int64_t i) { return factors + i * Maps<StudentA>::factors_of_row(segments) + 1 + segments; };
    const int64_t y = z - 1, place = z == 0 ? 0 : tokens.column[y] + ranges.count[0] + column - ranges.column[z];
    auto prefix_row_at = [&](int64_t i) {
      return PrefixRow{numerators + i * ranges.width + column, derivatives(i) + column, own_factors(i),
                       buffers.delta + i * segments, tokens.column, segments};
    };
    auto row_at = [&](int64_t i) {
      return typename Gradients::Row{numerators + i * ranges.width + column, derivatives(i) + place,
                                     own_factors(i)[segments + y], buffers.delta[i * segments + y]};
    };
    if (z == 0) Gradients::write(buffers.d_scores, rows.count, width, prefix_row_at);
    else Gradients::write(buffers.d_scores, rows.count, width, row_at);
  }

  void write_queries(const Rows& rows, int64_t head) {
    const Side& side = problem.student;
    const Vec scale = V::broadcast(static_cast<T>(side.softmax_scale));
    for (int64_t i = 0; i < rows.count; ++i) {
      T* row = buffers.dq + i * padded_dim;
      for (int64_t c = 0; c < padded_dim; c += W) V::store(row + c, V::load(row + c) * scale);
      const int64_t at = ((query_row(rows) + i) * side.num_heads + head) * side.head_dim;
      write_row(problem.dq, problem.gradient_element, at, row, side.head_dim);
    }
  }
};

}  // namespace IDRM_CAPABILITY
}  // namespace idrm
