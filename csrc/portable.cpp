// Any CPU: vectors of 16 bytes, which are SSE2 or NEON; and double precision.
#define IDRM_CAPABILITY portable
#include "kernels_of.h"

namespace idrm {
namespace portable {

using Single = Plain<float, 4, 2, 4>;
using Double = Plain<double, 2, 2, 4>;
extern const Kernels single_precision = KernelsOf<Single, Single>::table;
extern const Kernels double_precision = KernelsOf<Double, Double>::table;

}  // namespace portable
}  // namespace idrm
