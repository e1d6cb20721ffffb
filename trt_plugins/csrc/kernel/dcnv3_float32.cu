// SPDX-License-Identifier: Apache-2.0
#include "dcnv3_math.h"
#include "kernel.cuh"

namespace internimage {
template cudaError_t launch_variant<float>(const Dcnv3Params&, const Dcnv3Choice&, const Dcnv3Geometry&, cudaStream_t);
}
