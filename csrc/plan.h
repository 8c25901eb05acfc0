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

// Where the tokens (or units) of an example's segments, or other ranges, lie among the padded columns.
struct Columns {
  const int64_t* first;   // (ranges,) index of the first one in the batch
  const int64_t* count;   // (ranges,)
  const int64_t* column;  // (ranges + 1,) padded; the last is the width
  int64_t width;
};

// One side of one example, with its keys packed by the arithmetic's pack_keys.
struct ExampleSide {
  Columns tokens;      // of its maps: those of every segment, with a prefix that it shares
  Columns ranges;      // of its scores: rows of q and k, by segment; or a shared prefix, then the rest of each segment
  int64_t num_ranges;
  bool units_are_tokens;
  char* transposed;  // per kv head: panels of (head_dim, columns), as the scores read them
  char* natural;     // per kv head: (columns, padded head_dim), as dq reads them; null where it is not formed
  int64_t transposed_bytes, natural_bytes;  // of one kv head
};

struct Example {
  int64_t index;
  int64_t shared_units;  // of the prefix that all segments begin with
  int64_t chunk_rows;  // most student tokens of a chunk, but for a unit that is longer
  int64_t num_rows;    // of the student's q and k
  Columns units;
  ExampleSide student, teacher;
};

// The rows of one query segment for one head group, with buffers for its gradients until its loss is known.
struct Block {
  const Example* example;
  int64_t group, x;
  int64_t first_token;      // the query segment's
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

// A run of whole units of an example with a shared prefix: of the prefix, counted in segment 0, or of a segment's rest.
struct SharedChunk {
  int64_t range;        // 0 for the prefix, 1 + x for the rest of segment x
  int64_t first, last;  // units
  char* maps;           // SharedMaps; null where they are not kept
  char* numerators;     // (heads of the group, tokens, columns of the ranges); null where they are computed again
};

// All rows of an example with a shared prefix for one head group.
struct SharedBlock {
  const Example* example;
  int64_t group;
  const double* total_weights;  // (segments,)
  const double* factors;        // (query segments, key segments), once their losses are known
  char* softmax;                // (heads of the group, rows of the example, ...), see Maps::softmax_of_shared
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
