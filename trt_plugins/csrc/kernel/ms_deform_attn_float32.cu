// SPDX-License-Identifier: Apache-2.0
#include "kernel.cuh"
#include "ms_deform_attn_math.h"

namespace internimage {
template cudaError_t launch_variant<float>(const MsDeformAttnParams&, const MsDeformAttnChoice&, const Grid&,
                                           cudaStream_t);
}
