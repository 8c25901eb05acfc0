// One example: its columns, its packed keys, the sums of its dk, and the loss of its blocks.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels.h"
#include "memory.h"
#include "parallel.h"

namespace idrm {

// Every chunk of rows reads all keys and adds to all of dk once: more rows, less of that, as long as the numerators,
// which are written and read once, do not crowd out the rest of the last cache.
constexpr int64_t kMostChunkRows = 128, kLeastChunkRows = 16, kNumeratorBytes = 16 << 20;
// A strand has at least this many rows, for its dk has to be added to the others'; and these stay within these bytes.
constexpr int64_t kStrandRows = 256, kStrandBytes = 32 << 20;

inline int64_t element_bytes(Element element) {
  return element == Element::float64 ? 8 : element == Element::float32 ? 4 : 2;
}

inline int64_t compute_bytes(const Problem& problem) { return problem.student.element == Element::float64 ? 8 : 4; }

inline double row_weight(const Problem& problem, int64_t unit) {
  if (problem.row_weights == nullptr) return 1;
  return compute_bytes(problem) == 8 ? static_cast<const double*>(problem.row_weights)[unit]
                                     : static_cast<const float*>(problem.row_weights)[unit];
}

struct ColumnCounts {
  std::vector<int64_t> first, count, column{0};

  void add(int64_t begin, int64_t end) {
    first.push_back(begin);
    count.push_back(end - begin);
    column.push_back(column.back() + aligned(end - begin));
  }

  Columns view() const { return {first.data(), count.data(), column.data(), column.back()}; }

  // The units, or a side's tokens, of an example's segments.
  static ColumnCounts of_segments(const Problem& problem, int64_t example, const int64_t* offsets) {
    ColumnCounts columns;
    const int64_t* bounds = problem.cu_units + example * problem.segments;
    for (int64_t y = 0; y < problem.segments; ++y)
      if (offsets == nullptr) columns.add(bounds[y], bounds[y + 1]);
      else columns.add(offsets[bounds[y]], offsets[bounds[y + 1]]);
    return columns;
  }
};

// An example with all that its view points to; its memory is that of its packed keys and of `strands` sums of its dk.
struct ExampleState {
  ColumnCounts units, tokens, ranges, teacher_tokens;
  Example view{};
  bool is_packed = false;
  Parts memory;
  char* key_sums = nullptr;  // (strands, kv heads, columns, padded head_dim)
  int64_t key_sum_bytes = 0, strands = 1;

  // first_row: the first token's row of q and k, which hold `shared_units` of every segment once.
  ExampleState(const Problem& problem, int64_t index, int64_t first_row, int64_t shared_units)
      : units(ColumnCounts::of_segments(problem, index, nullptr)),
        tokens(ColumnCounts::of_segments(problem, index, problem.student.unit_offsets)),
        teacher_tokens(ColumnCounts::of_segments(problem, index, problem.teacher.unit_offsets)) {
    view.index = index;
    view.shared_units = shared_units;
    view.units = units.view();
    const int64_t* offsets = problem.student.unit_offsets;
    const int64_t prefix = offsets[units.first[0] + shared_units] - offsets[units.first[0]];
    int64_t row = first_row;
    auto add_range = [&](int64_t count) {
      ranges.add(row, row + count);
      row += count;
    };
    if (prefix > 0) add_range(prefix);
    for (const int64_t count : tokens.count) add_range(count - prefix);
    view.num_rows = row - first_row;
    view.student = side(tokens, ranges);
    view.teacher = side(teacher_tokens, teacher_tokens);
  }
  ExampleState(const ExampleState&) = delete;

  ExampleSide side(const ColumnCounts& tokens, const ColumnCounts& ranges) const {
    ExampleSide side{};
    side.tokens = tokens.view();
    side.ranges = ranges.view();
    side.num_ranges = static_cast<int64_t>(ranges.count.size());
    side.units_are_tokens = tokens.count == units.count;
    return side;
  }

  // Bounds of runs of whole units within [first, last), of at most chunk_rows tokens; a longer unit alone.
  std::vector<int64_t> cut(const Problem& problem, int64_t first, int64_t last) const {
    const int64_t* offsets = problem.student.unit_offsets;
    std::vector<int64_t> bounds{first};
    while (bounds.back() < last) {
      int64_t unit = bounds.back() + 1;
      while (unit < last && offsets[unit + 1] - offsets[bounds.back()] <= view.chunk_rows) ++unit;
      bounds.push_back(unit);
    }
    return bounds;
  }

  // Packed keys, and the sums of dk where gradients are wanted.
  void want_memory(const Problem& problem, const Kernels& kernels) {
    want_keys(problem, kernels, problem.student, view.student, false);
    if (problem.packed_teacher()) want_keys(problem, kernels, problem.teacher, view.teacher, true);
    if (!problem.needs_grad) return;
    key_sum_bytes = ranges.column.back() * aligned(problem.student.head_dim) * compute_bytes(problem);
    memory.want(key_sums, strands * problem.student.num_kv_heads * key_sum_bytes);
  }

  void want_keys(const Problem& problem, const Kernels& kernels, const Side& side, ExampleSide& keys, bool teacher) {
    keys.transposed_bytes = kernels.transposed_bytes(side, teacher, keys.ranges.width);
    memory.want(keys.transposed, keys.transposed_bytes * side.num_kv_heads);
    if (teacher || !problem.needs_grad) return;
    keys.natural_bytes = kernels.natural_bytes(side, keys.ranges.width);
    memory.want(keys.natural, keys.natural_bytes * side.num_kv_heads);
  }

  char* key_sum(const Problem& problem, int64_t strand, int64_t kv_head) const {
    return key_sums + (strand * problem.student.num_kv_heads + kv_head) * key_sum_bytes;
  }

  double total_weight(const Problem& problem, int64_t x) const {
    double total = 0;
    for (int64_t a = units.first[x]; a < units.first[x] + units.count[x]; ++a) total += row_weight(problem, a);
    return total;
  }
};

// Allocates those examples' memory that have none yet, packs their keys, and sets the sums of their dk to zero.
inline void pack(
    const Problem& problem, const Kernels& kernels, const std::vector<ExampleState*>& examples, int64_t threads) {
  struct Piece {
    ExampleState* example;
    bool teacher;
    int64_t kv_head;
  };
  std::vector<Piece> pieces;
  for (ExampleState* example : examples) {
    if (example->is_packed) continue;
    example->is_packed = true;
    example->memory.allocate();
    for (int64_t head = 0; head < problem.student.num_kv_heads; ++head) pieces.push_back({example, false, head});
    for (int64_t head = 0; problem.packed_teacher() && head < problem.teacher.num_kv_heads; ++head)
      pieces.push_back({example, true, head});
  }
  in_parallel(pieces.size(), threads, [&](int64_t task, int64_t) {
    const Piece& piece = pieces[task];
    kernels.pack_keys(problem, piece.example->view, piece.teacher, piece.kv_head);
    ExampleState& example = *piece.example;
    if (piece.teacher || example.key_sums == nullptr) return;
    for (int64_t strand = 0; strand < example.strands; ++strand)
      std::fill_n(example.key_sum(problem, strand, piece.kv_head), example.key_sum_bytes, 0);
  });
}

// The loss of a block, and what its gradients are still to be multiplied with.
struct BlockLoss {
  double loss, factor;
};

template <class T>
BlockLoss block_loss(
    const Problem& problem, const Columns& units, int64_t group, int64_t x, int64_t y, double total_weight) {
  double sum = 0;
  for (int64_t a = units.first[x]; a < units.first[x] + units.count[x]; ++a) {
    const int64_t row = group * problem.total_units + a;
    const double distance = static_cast<const T*>(problem.distances)[row * problem.segments + y];
    const double weight = row_weight(problem, a);
    sum += weight * (problem.reduction == Reduction::row ? std::sqrt(distance) : distance);
  }
  if (problem.reduction != Reduction::frobenius) return {total_weight > 0 ? sum / total_weight : 0, 1};
  const double loss = std::sqrt(sum);
  return {loss, loss > 0 ? 0.5 / loss : 0};
}

}  // namespace idrm
