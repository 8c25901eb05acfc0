// The table of kernels of one instruction set, made of its arithmetic; with the steps that end a block or an example.
#pragma once

#include "kernels.h"
#include "shared_sweep.h"
#include "sweep.h"

namespace idrm {
namespace IDRM_CAPABILITY {

template <class StudentA, class TeacherA>
struct KernelsOf {
  using T = typename StudentA::T;
  using V = typename StudentA::V;
  using Vec = typename StudentA::Vec;

  static int64_t transposed_bytes(const Side& side, bool teacher, int64_t columns) {
    return teacher ? units_of<TeacherA>(side.head_dim) * columns * sizeof(typename TeacherA::Unit)
                   : units_of<StudentA>(side.head_dim) * columns * sizeof(typename StudentA::Unit);
  }

  static int64_t natural_bytes(const Side& side, int64_t columns) {
    return units_of<StudentA>(columns) * aligned(side.head_dim) * sizeof(typename StudentA::Unit);
  }

  static void pack_keys(const Problem& problem, const Example& example, bool teacher, int64_t kv_head) {
    if (teacher) pack<TeacherA>(problem.teacher, example.teacher, kv_head);
    else pack<StudentA>(problem.student, example.student, kv_head);
  }

  template <class A>
  static void pack(const Side& side, const ExampleSide& keys, int64_t kv_head) {
    using Unit = typename A::Unit;
    Packing<A>::transposed_keys(
        side, keys, kv_head, reinterpret_cast<Unit*>(keys.transposed + kv_head * keys.transposed_bytes));
    if (keys.natural != nullptr)
      Packing<A>::natural_keys(
          side, keys, kv_head, reinterpret_cast<Unit*>(keys.natural + kv_head * keys.natural_bytes));
  }

  static int64_t arena_bytes(const Problem& problem, const Example& example) {
    Buffers<StudentA> buffers;
    return buffers.place(problem, example, nullptr);
  }

  static void run_strand(const Problem& problem, const Strand& strand, char* arena) {
    Sweep<StudentA, TeacherA>(problem, strand, arena).run();
  }

  static void write_queries(
      const Problem& problem, const Block& block, const double* factors, int64_t begin, int64_t end) {
    const Side& side = problem.student;
    const int64_t heads = side.num_heads / problem.num_head_groups, padded = aligned(side.head_dim);
    const int64_t first = first_head(problem, side.num_heads, block.group);
    const int64_t first_row = block.example->student.ranges.first[block.x];
    T* dq = reinterpret_cast<T*>(block.dq);
    for (int64_t row = begin; row < end; ++row)
      for (int64_t head = 0; head < heads; ++head) {
        T* sum = dq + (row * heads + head) * padded;
        for (int64_t c = 0; c < padded; c += StudentA::W) {
          Vec total = {};
          for (int64_t part = 0; part < block.query_components; ++part) {
            const T factor = static_cast<T>(factors[part] * side.softmax_scale);
            total += V::load(sum + part * block.num_rows * heads * padded + c) * V::broadcast(factor);
          }
          V::store(sum + c, total);
        }
        const int64_t at = ((first_row + row) * side.num_heads + first + head) * side.head_dim;
        write_row(problem.dq, problem.gradient_element, at, sum, side.head_dim);
      }
  }

  static void add_keys(
      const Problem& problem, const Strand& strand, const double* factors, int64_t kv_head, char* sum) {
    const Block& block = *strand.block;
    const Columns& tokens = block.example->student.tokens;
    const KvHeads own = kv_heads(problem, block.group);
    if (kv_head < own.first || kv_head >= own.first + own.count) return;
    const int64_t padded = aligned(problem.student.head_dim);
    T* out = reinterpret_cast<T*>(sum);
    for (int64_t part = 0; part < block.key_components; ++part)
      for (int64_t y = 0; y < problem.segments; ++y) {
        // Where components share a buffer, a key's segment is its component.
        const T factor = static_cast<T>(factors[block.key_components > 1 ? part : y] * problem.student.softmax_scale);
        const T* dk = reinterpret_cast<const T*>(strand.dk) +
                      (part * own.count + kv_head - own.first) * tokens.width * padded;
        for (int64_t c = tokens.column[y] * padded; c < tokens.column[y + 1] * padded; c += StudentA::W)
          V::store(out + c, V::load(out + c) + V::load(dk + c) * V::broadcast(factor));
      }
  }

  static void write_keys(const Problem& problem, const Example& example, int64_t kv_head, const char* sum) {
    const Side& side = problem.student;
    const Columns& ranges = example.student.ranges;
    const T* dk = reinterpret_cast<const T*>(sum);
    for (int64_t z = 0; z < example.student.num_ranges; ++z)
      for (int64_t j = 0; j < ranges.count[z]; ++j) {
        const int64_t at = ((ranges.first[z] + j) * side.num_kv_heads + kv_head) * side.head_dim;
        write_row(
            problem.dk, problem.gradient_element, at, dk + (ranges.column[z] + j) * aligned(side.head_dim),
            side.head_dim);
      }
  }

  using Shared = SharedSweep<StudentA, TeacherA>;

  static int64_t shared_softmax_bytes(const Problem& problem, const Example& example) {
    const int64_t heads = problem.student.num_heads / problem.num_head_groups;
    return heads * example.num_rows * Maps<StudentA>::factors_of_row(problem.segments) * sizeof(T);
  }

  static int64_t shared_map_bytes(const Problem& problem, const Example& example, const SharedChunk& chunk) {
    return SharedMaps<T>(problem, example, chunk.last - chunk.first, chunk.range == 0).size() * sizeof(T);
  }

  static int64_t shared_numerator_bytes(const Problem& problem, const Example& example, const SharedChunk& chunk) {
    const int64_t heads = problem.student.num_heads / problem.num_head_groups;
    const int64_t* offsets = problem.student.unit_offsets;
    const int64_t rows = heads * (offsets[chunk.last] - offsets[chunk.first]);
    return rows * example.student.ranges.width * sizeof(typename StudentA::Numerator);
  }

  static int64_t shared_arena_bytes(const Problem& problem, const Example& example) {
    SharedBuffers<StudentA> buffers;
    return buffers.place(problem, example, nullptr);
  }

  static void compare_shared(
      const Problem& problem, const SharedBlock& block, const SharedChunk& chunk, char* arena) {
    Shared(problem, block, chunk, arena).compare();
  }

  static void differentiate_shared(
      const Problem& problem, const SharedBlock& block, const SharedChunk& chunk, char* arena) {
    Shared(problem, block, chunk, arena).differentiate();
  }

  static void add_shared_gradients(
      const Problem& problem, const SharedBlock& block, const SharedChunk& chunk, int64_t kv_head, char* dk,
      char* arena) {
    Shared(problem, block, chunk, arena).add_gradients(kv_head, reinterpret_cast<T*>(dk));
  }

  static void sum_shared_keys(
      const Problem& problem, const Example& example, char* dk, int64_t strands, int64_t stride) {
    const int64_t count = example.student.ranges.width * aligned(problem.student.head_dim);
    const Vec scale = V::broadcast(static_cast<T>(problem.student.softmax_scale));
    for (int64_t c = 0; c < count; c += StudentA::W) {
      Vec sum = V::load(reinterpret_cast<T*>(dk) + c);
      for (int64_t strand = 1; strand < strands; ++strand)
        sum += V::load(reinterpret_cast<const T*>(dk + strand * stride) + c);
      V::store(reinterpret_cast<T*>(dk) + c, sum * scale);
    }
  }

  static constexpr Kernels table = {
      transposed_bytes, natural_bytes, pack_keys, arena_bytes, run_strand, write_queries, add_keys, write_keys,
      shared_softmax_bytes, shared_map_bytes, shared_numerator_bytes, shared_arena_bytes, compare_shared,
      differentiate_shared, add_shared_gradients, sum_shared_keys};
};

}  // namespace IDRM_CAPABILITY
}  // namespace idrm
