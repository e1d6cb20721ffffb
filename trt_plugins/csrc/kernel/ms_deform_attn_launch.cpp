// SPDX-License-Identifier: Apache-2.0
#include "ms_deform_attn_launch.h"

#include "launch.h"

namespace internimage {

cudaError_t launch_ms_deform_attn(const MsDeformAttnParams& p, DType dtype, int32_t tactic, cudaStream_t stream) {
    return launch(p, dtype, tactic, stream);
}

}  // namespace internimage
