// x86 CPUs with AVX-512.
#ifdef __x86_64__
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")
#define IDRM_CAPABILITY avx512
#include "kernels_of.h"

namespace idrm {
namespace avx512 {

using Single = Plain<float, 16, 6, 4>;
extern const Kernels single_precision = KernelsOf<Single, Single>::table;

}  // namespace avx512
}  // namespace idrm
#endif
