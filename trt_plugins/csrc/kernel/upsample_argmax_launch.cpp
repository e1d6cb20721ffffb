// SPDX-License-Identifier: Apache-2.0
#include "upsample_argmax_launch.h"

#include "launch.h"

namespace internimage {

cudaError_t launch_upsample_argmax(const UpsampleArgmaxParams& p, DType dtype, int32_t tactic, cudaStream_t stream) {
    return launch(p, dtype, tactic, stream);
}

}  // namespace internimage
