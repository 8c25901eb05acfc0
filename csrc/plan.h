// How the work is cut: columns, chunks of rows, strands of chunks. All of it follows from an example alone.
#pragma once

#include <cstdint>

#include "problem.h"

namespace idrm {

// Columns of a map are padded segment by segment to this many, and head_dim likewise: a multiple of every vector.
constexpr int64_t kAlignment = 16;
// Keys are packed in panels of this many columns, and gradients of scores are formed for as many keys at a time.
constexpr int64_t kPanel = 64;

IDRM_INLINE int64_t aligned(int64_t count) { return (count + kAlignment - 1) / kAlignment * kAlignment; }

// Where the tokens (or units) of an example's segments lie among the padded columns.
struct Columns {
  const int64_t* first;   // (segments,) index of the first one in the batch
  const int64_t* count;   // (segments,)
  const int64_t* column;  // (segments + 1,) padded; the last is the width
  int64_t width;
};

// One side of one example, with its keys packed by the arithmetic's pack_keys.
struct ExampleSide {
  Columns tokens;
  bool units_are_tokens;
  char* transposed;  // per kv head: panels of (head_dim, columns), as the scores read them
  char* natural;     // per kv head: (columns, padded head_dim), as dq reads them; null where it is not formed
  int64_t transposed_bytes, natural_bytes;  // of one kv head
};

struct Example {
  int64_t index;
  int64_t chunk_rows;  // most student tokens of a chunk, but for a unit that is longer
  Columns units;
  ExampleSide student, teacher;
};

// The rows of one query segment for one head group, with buffers for its gradients until its loss is known.
struct Block {
  const Example* example;
  int64_t group, x;
  int64_t first_row;        // first student token of the query segment
  int64_t num_rows;
  int64_t query_components; // parts of dq that get factors of their own: key segments, or 1
  int64_t key_components;   // the same of dk: where a key belongs to one part only, they share a buffer
  bool needs_grad;
  double total_weight;
  char* dq;                 // (query_components, rows, heads of the group, padded head_dim)
};

// Consecutive chunks of a block, done by one thread one after the other.
struct Strand {
  const Block* block;
  const int64_t* chunk_units;  // (num_chunks + 1,) bounds of the chunks' units
  int64_t num_chunks;
  char* dk;                    // (key_components, kv heads of the group, columns, padded head_dim)
};

IDRM_INLINE int64_t first_head(const Problem& problem, int64_t heads, int64_t group) {
  return group * (heads / problem.num_head_groups);
}

// The kv heads that a group's query heads read.
struct KvHeads {
  int64_t first, count;
};

IDRM_INLINE KvHeads kv_heads(const Problem& problem, int64_t group) {
  const int64_t heads = problem.student.num_heads / problem.num_head_groups;
  const int64_t shared = problem.student.num_heads / problem.student.num_kv_heads;
  const int64_t first = group * heads / shared;
  return {first, ((group + 1) * heads - 1) / shared - first + 1};
}

}  // namespace idrm
