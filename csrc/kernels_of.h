// The table of kernels of one instruction set, made of its arithmetic; with the steps that end a block or an example.
#pragma once

#include "kernels.h"
#include "sweep.h"

namespace idrm {
namespace IDRM_CAPABILITY {

template <class T>
IDRM_INLINE void write_row(void* out, Element element, int64_t at, const T* values, int64_t count) {
  switch (element) {
    case Element::float32:
      for (int64_t c = 0; c < count; ++c) static_cast<float*>(out)[at + c] = static_cast<float>(values[c]);
      break;
    case Element::float64:
      for (int64_t c = 0; c < count; ++c) static_cast<double*>(out)[at + c] = static_cast<double>(values[c]);
      break;
    case Element::bfloat16:
      for (int64_t c = 0; c < count; ++c)
        static_cast<uint16_t*>(out)[at + c] = to_bfloat16(static_cast<float>(values[c]));
      break;
    case Element::float16: __builtin_unreachable();
  }
}

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
    if (teacher) pack<TeacherA>(problem, problem.teacher, example.teacher, kv_head);
    else pack<StudentA>(problem, problem.student, example.student, kv_head);
  }

  template <class A>
  static void pack(const Problem& problem, const Side& side, const ExampleSide& keys, int64_t kv_head) {
    using Unit = typename A::Unit;
    Packing<A>::transposed_keys(
        side, keys.tokens, problem.segments, kv_head,
        reinterpret_cast<Unit*>(keys.transposed + kv_head * keys.transposed_bytes));
    if (keys.natural != nullptr)
      Packing<A>::natural_keys(
          side, keys.tokens, problem.segments, kv_head,
          reinterpret_cast<Unit*>(keys.natural + kv_head * keys.natural_bytes));
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
        const int64_t at = ((block.first_row + row) * side.num_heads + first + head) * side.head_dim;
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
    const Columns& tokens = example.student.tokens;
    const T* dk = reinterpret_cast<const T*>(sum);
    for (int64_t y = 0; y < problem.segments; ++y)
      for (int64_t j = 0; j < tokens.count[y]; ++j) {
        const int64_t at = ((tokens.first[y] + j) * side.num_kv_heads + kv_head) * side.head_dim;
        write_row(
            problem.dk, problem.gradient_element, at, dk + (tokens.column[y] + j) * aligned(side.head_dim),
            side.head_dim);
      }
  }

  static constexpr Kernels table = {
      transposed_bytes, natural_bytes, pack_keys, arena_bytes, run_strand, write_queries, add_keys, write_keys};
};

}  // namespace IDRM_CAPABILITY
}  // namespace idrm
