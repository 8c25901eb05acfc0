// Which instruction set is used: this CPU's best, unless IDRM_KERNELS_CPU_CAPABILITY names a lesser one.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace idrm {
namespace {

constexpr Capability kAll[] = {
    Capability::portable, Capability::avx2, Capability::avx512, Capability::avx512_bf16};

bool supported(Capability capability) {
#ifdef __x86_64__
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  switch (capability) {
    case Capability::portable: return true;
    case Capability::avx2: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case Capability::avx512: return avx512;
    case Capability::avx512_bf16: return avx512 && __builtin_cpu_supports("avx512bf16");
  }
#endif
  return capability == Capability::portable;
}

Capability find() {
  const char* wanted = std::getenv("IDRM_KERNELS_CPU_CAPABILITY");
  if (wanted == nullptr || *wanted == 0) {
    Capability best = Capability::portable;
    for (const Capability one : kAll)
      if (supported(one)) best = one;
    return best;
  }
  for (const Capability one : kAll)
    if (std::string(wanted) == name(one)) {
      if (supported(one)) return one;
      throw std::runtime_error(std::string("IDRM_KERNELS_CPU_CAPABILITY: this CPU has no ") + wanted);
    }
  throw std::runtime_error(
      std::string("IDRM_KERNELS_CPU_CAPABILITY: expected portable, avx2, avx512 or avx512_bf16, got ") + wanted);
}

}  // namespace

const char* name(Capability capability) {
  switch (capability) {
    case Capability::portable: return "portable";
    case Capability::avx2: return "avx2";
    case Capability::avx512: return "avx512";
    case Capability::avx512_bf16: return "avx512_bf16";
  }
  return "";
}

Capability capability() {
  static const Capability found = find();
  return found;
}

const Kernels& choose_kernels(const Problem& problem) {
  if (problem.student.element == Element::float64) return portable::double_precision;
#ifdef __x86_64__
  const bool student = problem.student.element == Element::bfloat16;
  const bool teacher = problem.packed_teacher() && problem.teacher.element == Element::bfloat16;
  switch (capability()) {
    case Capability::avx512_bf16:
      if (student) return teacher || !problem.packed_teacher() ? avx512_bf16::both : avx512_bf16::student;
      if (teacher) return avx512_bf16::teacher;
      [[fallthrough]];
    case Capability::avx512: return avx512::single_precision;
    case Capability::avx2: return avx2::single_precision;
    case Capability::portable: break;
  }
#endif
  return portable::single_precision;
}

}  // namespace idrm
