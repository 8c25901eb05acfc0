// What an instruction set provides, for one kind of student and one of teacher: the steps of the schedule.
#pragma once

#include "plan.h"

namespace idrm {

struct Kernels {
  // Bytes of one kv head's packed keys; of a natural copy 0 where no gradient is wanted.
  int64_t (*transposed_bytes)(const Side&, bool teacher, int64_t columns);
  int64_t (*natural_bytes)(const Side&, int64_t columns);
  void (*pack_keys)(const Problem&, const Example&, bool teacher, int64_t kv_head);
  // Bytes of the arena that a strand of an example takes.
  int64_t (*arena_bytes)(const Problem&, const Example&);
  void (*run_strand)(const Problem&, const Strand&, char* arena);
  // Writes rows [begin, end) of a block's dq: its components times their factors (query_components,).
  void (*write_queries)(const Problem&, const Block&, const double* factors, int64_t begin, int64_t end);
  // Adds a strand's dk of one kv head to the example's sum (columns, padded head_dim); factors (segments,).
  void (*add_keys)(const Problem&, const Strand&, const double* factors, int64_t kv_head, char* sum);
  void (*write_keys)(const Problem&, const Example&, int64_t kv_head, const char* sum);

  // Examples that share a prefix (shared_sweep.h). Bytes of a block's softmax, and of a chunk's maps and numerators.
  int64_t (*shared_softmax_bytes)(const Problem&, const Example&);
  int64_t (*shared_map_bytes)(const Problem&, const Example&, const SharedChunk&);
  int64_t (*shared_numerator_bytes)(const Problem&, const Example&, const SharedChunk&);
  int64_t (*shared_arena_bytes)(const Problem&, const Example&);
  void (*compare_shared)(const Problem&, const SharedBlock&, const SharedChunk&, char* arena);
  void (*differentiate_shared)(const Problem&, const SharedBlock&, const SharedChunk&, char* arena);
  // Writes dq and adds to dk of one kv head (columns, padded head_dim), the latter without softmax_scale.
  void (*add_shared_gradients)(
      const Problem&, const SharedBlock&, const SharedChunk&, int64_t kv_head, char* dk, char* arena);
  // Adds the dk of some strands up and applies softmax_scale, in place of the first.
  void (*sum_shared_keys)(const Problem&, const Example&, char* dk, int64_t strands, int64_t stride);
};

enum class Capability { portable, avx2, avx512, avx512_bf16 };

// The best of this CPU, or what IDRM_KERNELS_CPU_CAPABILITY asks for; read once.
Capability capability();
const char* name(Capability);

// Kernels for the dtypes of a problem; every pointer is set.
const Kernels& choose_kernels(const Problem&);

namespace portable {
extern const Kernels single_precision, double_precision;
}
#ifdef __x86_64__
namespace avx2 {
extern const Kernels single_precision;
}
namespace avx512 {
extern const Kernels single_precision;
}
namespace avx512_bf16 {
// Student and teacher in bfloat16; either alone.
extern const Kernels both, student, teacher;
}
#endif

}  // namespace idrm
