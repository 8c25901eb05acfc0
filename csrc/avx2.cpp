// x86 CPUs with AVX2 and FMA.
#ifdef __x86_64__
#pragma GCC target("avx2,fma")
#define IDRM_CAPABILITY avx2
#include "kernels_of.h"

namespace idrm {
namespace avx2 {

using Single = Plain<float, 8, 6, 2>;
extern const Kernels single_precision = KernelsOf<Single, Single>::table;

}  // namespace avx2
}  // namespace idrm
#endif
