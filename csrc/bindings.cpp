// The extension module idrm_kernels._C: importing it registers idrm_kernels_cpp::run, on torch's stable ABI.
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "schedule.h"

namespace {

using idrm::Element;
using torch::stable::Tensor;

Element element_of(const Tensor& tensor) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Element::float32;
    case ScalarType::Double: return Element::float64;
    case ScalarType::BFloat16: return Element::bfloat16;
    case ScalarType::Half: return Element::float16;
    default: throw std::runtime_error("idrm_kernels._C: a tensor of a dtype that it does not compute with");
  }
}

template <class T>
const T* pointer(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

void describe(idrm::Side& side, const Tensor& q, const Tensor& k) {
  side.q = q.const_data_ptr();
  side.k = k.const_data_ptr();
  side.element = element_of(q);
  side.num_heads = q.size(1);
  side.num_kv_heads = k.size(1);
  side.head_dim = q.size(2);
}

// Tensors are contiguous and checked by idrm_kernels/impl/cpp.py. Fills distances, dq, dk and, for the loss, `losses`
// (2,) float64: intra, inter.
void run(
    Tensor q, Tensor k, std::optional<Tensor> teacher_q, std::optional<Tensor> teacher_k,
    std::optional<Tensor> positions, std::optional<Tensor> slot_of_delta, std::optional<Tensor> c2p,
    std::optional<Tensor> p2c, std::optional<Tensor> maps, Tensor cu_units, Tensor unit_offsets,
    Tensor teacher_unit_offsets, Tensor shared_units, std::optional<Tensor> row_weights,
    std::optional<Tensor> coefficients, Tensor distances, Tensor dq, Tensor dk, Tensor losses, int64_t segments,
    double softmax_scale, double teacher_softmax_scale, bool causal, bool teacher_causal, bool kl, bool joint,
    int64_t num_head_groups, int64_t workspace_bytes, int64_t task, int64_t reduction, double intra_weight,
    double inter_weight, bool needs_grad) {
  idrm::Problem problem;
  describe(problem.student, q, k);
  problem.student.softmax_scale = softmax_scale;
  problem.student.causal = causal;
  problem.student.unit_offsets = static_cast<const int64_t*>(unit_offsets.const_data_ptr());
  idrm::Side& teacher = problem.teacher;
  if (teacher_q.has_value()) describe(teacher, *teacher_q, *teacher_k);
  teacher.softmax_scale = teacher_softmax_scale;
  teacher.causal = teacher_causal;
  teacher.unit_offsets = static_cast<const int64_t*>(teacher_unit_offsets.const_data_ptr());
  if (positions.has_value() && (c2p.has_value() || p2c.has_value())) {
    teacher.positions = pointer<int32_t>(positions);
    teacher.slot_of_delta = pointer<int32_t>(slot_of_delta);
    teacher.max_delta = slot_of_delta->numel() / 2;
    teacher.num_slots = (c2p.has_value() ? c2p : p2c)->size(2);
    teacher.c2p = pointer<void>(c2p);
    teacher.p2c = pointer<void>(p2c);
    if (c2p.has_value()) teacher.c2p_element = element_of(*c2p);
    if (p2c.has_value()) teacher.p2c_element = element_of(*p2c);
    // Under torch.compile nothing in Python has read them.
    for (int64_t i = 0; i < slot_of_delta->numel(); ++i)
      if (teacher.slot_of_delta[i] < 0 || teacher.slot_of_delta[i] >= teacher.num_slots)
        throw std::runtime_error(
            "position_bias.slot_of_delta: expected slots in [0, " + std::to_string(teacher.num_slots) + "), got " +
            std::to_string(teacher.slot_of_delta[i]));
  }
  if (maps.has_value()) {
    problem.maps = maps->const_data_ptr();
    problem.maps_element = element_of(*maps);
    problem.max_units = maps->size(2);
  }
  problem.cu_units = static_cast<const int64_t*>(cu_units.const_data_ptr());
  problem.segments = segments;
  problem.num_examples = (cu_units.numel() - 1) / segments;
  problem.total_units = unit_offsets.numel() - 1;
  problem.num_head_groups = num_head_groups;
  problem.shared_units = static_cast<const int64_t*>(shared_units.const_data_ptr());
  problem.total_rows = q.size(0);
  problem.kl = kl;
  problem.joint = joint;
  problem.workspace_bytes = workspace_bytes;
  problem.task = static_cast<idrm::Task>(task);
  problem.reduction = static_cast<idrm::Reduction>(reduction);
  problem.needs_grad = needs_grad;
  problem.intra_weight = intra_weight;
  problem.inter_weight = inter_weight;
  problem.row_weights = pointer<void>(row_weights);
  problem.coefficients = pointer<void>(coefficients);
  problem.distances = distances.mutable_data_ptr();
  problem.dq = dq.mutable_data_ptr();
  problem.dk = dk.mutable_data_ptr();
  problem.gradient_element = element_of(dq);
  const idrm::Losses sums = idrm::run(problem);
  double* out = static_cast<double*>(losses.mutable_data_ptr());
  out[0] = sums.intra;
  out[1] = sums.inter;
}

std::string capability() { return idrm::name(idrm::capability()); }

void release_memory() { idrm::release_memory(); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(idrm_kernels_cpp, m) {
  m.def(
      "run(Tensor q, Tensor k, Tensor? teacher_q, Tensor? teacher_k, Tensor? positions, Tensor? slot_of_delta, "
      "Tensor? c2p, Tensor? p2c, Tensor? maps, Tensor cu_units, Tensor unit_offsets, Tensor teacher_unit_offsets, "
      "Tensor shared_units, Tensor? row_weights, Tensor? coefficients, Tensor(a!) distances, Tensor(b!) dq, "
      "Tensor(c!) dk, Tensor(d!) losses, int segments, float softmax_scale, float teacher_softmax_scale, bool causal, "
      "bool teacher_causal, bool kl, bool joint, int num_head_groups, int workspace_bytes, int task, int reduction, "
      "float intra_weight, float inter_weight, bool needs_grad) -> ()");
  m.def("capability() -> str");
  m.def("release_memory() -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(idrm_kernels_cpp, CPU, m) { m.impl("run", TORCH_BOX(&run)); }
STABLE_TORCH_LIBRARY_IMPL(idrm_kernels_cpp, CompositeExplicitAutograd, m) {
  m.impl("capability", TORCH_BOX(&capability));
  m.impl("release_memory", TORCH_BOX(&release_memory));
}

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
