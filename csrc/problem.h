// What is to be computed: plain pointers and counts, named as in idrm_kernels/impl/problem.py.
#pragma once

#include <cstddef>
#include <cstdint>

#define IDRM_INLINE inline __attribute__((always_inline))

namespace idrm {

enum class Element { float32, float64, bfloat16, float16 };
enum class Reduction { frobenius, row, row_sq };
// The forward of the distance, its backward, or the loss with or without gradients.
enum class Task { distance, distance_backward, loss };

// One model's attention over the packed tokens of a batch.
struct Side {
  const void* q = nullptr;  // (tokens, num_heads, head_dim)
  const void* k = nullptr;  // (tokens, num_kv_heads, head_dim)
  Element element = Element::float32;
  int64_t num_heads = 0, num_kv_heads = 0, head_dim = 0;
  double softmax_scale = 1;
  bool causal = false;
  const int32_t* positions = nullptr;      // (tokens,)
  const int32_t* slot_of_delta = nullptr;  // (2 * max_delta + 1,)
  int64_t max_delta = 0, num_slots = 0;
  const void* c2p = nullptr;  // (tokens, num_heads, num_slots)
  const void* p2c = nullptr;
  Element c2p_element = Element::float32, p2c_element = Element::float32;
  const int64_t* unit_offsets = nullptr;  // (total_units + 1,)
};

struct Problem {
  Side student, teacher;
  const void* maps = nullptr;  // (num_examples, num_head_groups, max_units, max_units); null for a packed teacher
  Element maps_element = Element::float32;
  int64_t max_units = 0;
  const int64_t* cu_units = nullptr;  // (num_examples * segments + 1,)
  int64_t segments = 0, num_examples = 0, total_units = 0, num_head_groups = 1;
  const int64_t* shared_units = nullptr;  // (num_examples,)
  int64_t total_rows = 0;                 // of the student's q and k; its tokens, but for shared prefixes
  bool kl = false, joint = false;
  int64_t workspace_bytes = 0;  // changes no bit of the result

  Task task = Task::distance;
  Reduction reduction = Reduction::frobenius;
  bool needs_grad = false;
  double intra_weight = 1, inter_weight = 1;
  // In the dtype of computation (float, or double for float64): (total_units,) or null; and the incoming gradient of
  // the distances (num_head_groups, total_units, segments).
  const void* row_weights = nullptr;
  const void* coefficients = nullptr;

  void* distances = nullptr;  // (num_head_groups, total_units, segments)
  void* dq = nullptr;         // as q and k, in gradient_element
  void* dk = nullptr;
  Element gradient_element = Element::float32;

  IDRM_INLINE bool packed_teacher() const { return maps == nullptr; }
  IDRM_INLINE bool bias() const { return teacher.positions != nullptr; }
  // Whether the gradients of every block are to be multiplied with a factor that is known after its last row only.
  IDRM_INLINE bool apart() const { return task == Task::loss && reduction == Reduction::frobenius; }
  IDRM_INLINE double block_weight(int64_t x, int64_t y) const {
    if (task != Task::loss) return 1;
    return (x == y ? intra_weight : inter_weight) / static_cast<double>(num_head_groups * num_examples);
  }
};

}  // namespace idrm
