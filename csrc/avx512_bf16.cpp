// x86 CPUs that multiply bfloat16: two products a lane and instruction, summed in float.
#ifdef __x86_64__
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,prefer-vector-width=512")
#define IDRM_CAPABILITY avx512_bf16
#define IDRM_BFLOAT16_PAIRS
#include "kernels_of.h"

namespace idrm {
namespace avx512_bf16 {

using Single = Plain<float, 16, 6, 4>;
extern const Kernels both = KernelsOf<BFloat16Pairs, BFloat16Pairs>::table;
extern const Kernels student = KernelsOf<BFloat16Pairs, Single>::table;
extern const Kernels teacher = KernelsOf<Single, BFloat16Pairs>::table;

}  // namespace avx512_bf16
}  // namespace idrm
#endif
