// SPDX-License-Identifier: Apache-2.0
#include "kernel.cuh"
#include "upsample_argmax_math.h"

namespace internimage {
template cudaError_t launch_variant<BFloat16>(const UpsampleArgmaxParams&, const UpsampleArgmaxChoice&, const Grid&,
                                              cudaStream_t);
}
