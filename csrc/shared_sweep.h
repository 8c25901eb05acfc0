// An example whose segments share a prefix: a prefix row's scores stand for all query segments, a prefix key's for all
// key segments. Its chunks are compared first; when the coefficients of their rows are known, gradients follow, a head
// at a time over all chunks.
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
  using Numerator = typename A::Numerator;

  T* scores;       // (chunk_rows, columns) of one head, which become numerators in place
  Numerator* numerators;
  T* student_map;  // (chunk_rows, unit columns)
  T* maps;         // SharedMaps of a chunk that are not kept
  T* delta;        // (chunk_rows, segments)
  T* dq;           // (chunk_rows, padded head_dim)
  Unit *query_rows, *d_scores;

  int64_t place(const Problem& problem, const Example& example, char* base);
};

// The maps of a chunk, one for every query segment that its rows lie in: the teacher's, then d distance / d map. The
// first of them becomes d loss / d map, which is spread to tokens behind them where units are merged.
template <class T>
struct SharedMaps {
  int64_t units, columns, queries, token_columns;  // token_columns: 0 where units are tokens

  SharedMaps(const Problem& problem, const Example& example, int64_t units, bool prefix)
      : units(units), columns(example.units.width), queries(prefix ? problem.segments : 1),
        token_columns(example.student.units_are_tokens ? 0 : example.student.tokens.width) {}

  T* map(T* maps, int64_t query) const { return maps + query * units * columns; }
  T* derivatives(T* maps) const { return map(maps, token_columns > 0 ? queries : 0); }
  // The vectors that end a segment's rest may reach beyond a row.
  T* slack(T* maps) const { return map(maps, queries) + units * token_columns; }
  int64_t size() const { return queries * units * columns + units * token_columns + kAlignment; }
};

template <class A>
int64_t SharedBuffers<A>::place(const Problem& problem, const Example& example, char* base) {
  const int64_t rows = example.chunk_rows;
  Layout layout{base};
  RowBuffers<A>::place(problem, example, layout);
  layout.put(scores, rows * example.student.ranges.width);
  layout.put(numerators, sizeof(Numerator) == sizeof(T) ? 0 : rows * example.student.ranges.width);
  layout.put(student_map, rows * example.units.width);
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
  using Numerator = typename StudentA::Numerator;
  using V = typename StudentA::V;
  using Vec = typename StudentA::Vec;
  static constexpr int W = StudentA::W;
  static constexpr bool kRounded = sizeof(Numerator) != sizeof(T);

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

  // Distances of the chunk's rows and the factors of their softmax; their maps where they are kept.
  void compare() {
    for (int64_t query = 0; query < layout.queries; ++query)
      comparison.teacher_map(unit_in(query, chunk.first), unit_in(query, chunk.last), layout.map(maps, query));
    T* student = buffers.student_map;
    clear(student, layout.units * layout.columns);
    for_pieces([&](const Rows& rows, int64_t done) {
      clear(buffers.mean, rows.count * tokens.width + kAlignment);
      for (int64_t head = 0; head < heads; ++head) {
        find_scores(rows, head, buffers.scores);
        Maps<StudentA>::softmax_of_shared(rows, buffers.scores, factors_row(rows, head), buffers.mean);
        if (Numerator* kept = kept_numerators(head, done)) keep(rows, buffers.scores, kept);
      }
      Maps<StudentA>::merge(rows, example.units, chunk.first, buffers.mean, student);
    });
    Maps<StudentA>::average(problem.student, heads, chunk.first, layout.units, layout.columns, student);
    for (int64_t query = 0; query < layout.queries; ++query) {
      T* map = layout.map(maps, query);
      comparison.distances(unit_in(query, chunk.first), unit_in(query, chunk.last), student, map);
      if (chunk.maps == nullptr) continue;
      for (int64_t row = 0; row < layout.units; ++row)
        for (int64_t y = 0; y < segments; ++y) {
          const int64_t at = row * layout.columns + example.units.column[y];
          comparison.map_gradient(y, 1, student + at, map + at, map + at);
        }
    }
  }

  // d loss / d map of the chunk's rows, summed over their query segments, by tokens; its maps must be kept.
  void differentiate() {
    const Columns& units = example.units;
    for (int64_t row = 0; row < layout.units; ++row)
      for (int64_t y = 0; y < segments; ++y) {
        const int64_t at = row * layout.columns + units.column[y];
        T* out = layout.map(maps, 0) + at;
        for (int64_t query = 0; query < layout.queries; ++query) {
          const int64_t x = segment_of(query), unit = unit_in(query, chunk.first + row);
          const T factor = comparison.coefficient(unit, x, y, block.total_weights[x]) *
                           static_cast<T>(block.factors[x * segments + y]) / comparison.averaged_entries(unit);
          const T* map = layout.map(maps, query) + at;
          for (int64_t b = 0; b < units.column[y + 1] - units.column[y]; b += W) {
            const Vec own = V::load(map + b) * V::broadcast(factor);
            V::store(out + b, query == 0 ? own : V::load(out + b) + own);
          }
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
        const Numerator* numerators = kept_numerators(head, done);
        if (numerators == nullptr) {
          find_scores(rows, head, buffers.scores);
          Maps<StudentA>::numerators_of_shared(rows, buffers.scores, factors);
          if (kRounded) keep(rows, buffers.scores, buffers.numerators);
          numerators = kRounded ? buffers.numerators : reinterpret_cast<const Numerator*>(buffers.scores);
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

  // From a row of the chunk on; null where they are computed again.
  Numerator* kept_numerators(int64_t head, int64_t row) const {
    if (chunk.numerators == nullptr) return nullptr;
    const int64_t* offsets = problem.student.unit_offsets;
    const int64_t rows = offsets[chunk.last] - offsets[chunk.first];
    return reinterpret_cast<Numerator*>(chunk.numerators) + (head * rows + row) * ranges.width;
  }

  void keep(const Rows& rows, const T* numerators, Numerator* out) const {
    for (int64_t j = 0; j < rows.count * ranges.width; j += W)
      StudentA::store_numerators(out + j, V::load(numerators + j));
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

  // delta = sum over a softmax's support of P dP, for every key segment; divided by that of P, which rounded numerators
  // take away from 1.
  void find_deltas(const Rows& rows, const Numerator* numerators, const T* factors) {
    int64_t unit = chunk.first;
    for (int64_t i = 0; i < rows.count; ++i) {
      while (problem.student.unit_offsets[unit + 1] <= rows.first + i) ++unit;
      const Numerator* n = numerators + i * ranges.width;
      const T* of_prefix = factors + i * Maps<StudentA>::factors_of_row(segments) + 1 + segments;
      const T* of_rest = of_prefix + segments;
      T* delta = buffers.delta + i * segments;
      Sums all{};
      for (int64_t y = 0; y < segments; ++y) {
        const T* dp = derivatives_row(unit) + tokens.column[y];
        Sums own{};
        add_sums(n, dp, ranges.column[1], of_prefix[y], own);
        add_sums(
            n + ranges.column[1 + y], dp + ranges.count[0], ranges.column[2 + y] - ranges.column[1 + y], of_rest[y],
            own);
        delta[y] = kRounded ? own.derivatives / own.probabilities : own.derivatives;
        all.derivatives += own.derivatives;
        all.probabilities += own.probabilities;
      }
      for (int64_t y = 0; problem.joint && y < segments; ++y)
        delta[y] = kRounded ? all.derivatives / all.probabilities : all.derivatives;
    }
  }

  struct Sums {
    T derivatives, probabilities;  // of P dP and, where numerators are rounded, P
  };

  static void add_sums(const Numerator* numerators, const T* derivatives, int64_t count, T factor, Sums& sums) {
    Vec products = {}, own = {};
    for (int64_t j = 0; j < count; j += W) {
      const Vec n = StudentA::load_numerators(numerators + j);
      products += n * V::load(derivatives + j);
      if (kRounded) own += n;
    }
    sums.derivatives += V::sum(products) * factor;
    if (kRounded) sums.probabilities += V::sum(own) * factor;
  }

  // A key has part in so many segments' maps: in all where it belongs to the prefix.
  struct Row {
    const Numerator* numerators;
    const T *derivatives, *factors, *delta;
    const int64_t* column;
    int64_t maps;

    IDRM_INLINE Vec at(int64_t j) const {
      Vec sum = V::broadcast(factors[0]) * (V::load(derivatives + j) - V::broadcast(delta[0]));
      for (int64_t y = 1; y < maps; ++y)
        sum += V::broadcast(factors[y]) * (V::load(derivatives + column[y] + j) - V::broadcast(delta[y]));
      return StudentA::load_numerators(numerators + j) * sum;
    }
  };

  void find_score_gradients(
      const Rows& rows, int64_t z, int64_t column, int64_t width, const Numerator* numerators, const T* factors) {
    const int64_t y = z == 0 ? 0 : z - 1, before = z == 0 ? 0 : tokens.column[y] + ranges.count[0];
    const int64_t own_factors = 1 + segments + (z == 0 ? 0 : segments + y), place = before + column - ranges.column[z];
    int64_t unit = chunk.first;
    auto row_at = [&](int64_t i) {
      while (problem.student.unit_offsets[unit + 1] <= rows.first + i) ++unit;
      return Row{numerators + i * ranges.width + column,
                 derivatives_row(unit) + place,
                 factors + i * Maps<StudentA>::factors_of_row(segments) + own_factors,
                 buffers.delta + i * segments + y,
                 tokens.column,
                 z == 0 ? segments : 1};
    };
    ScoreGradients<StudentA>::write(buffers.d_scores, rows.count, width, row_at);
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
