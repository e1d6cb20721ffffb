// SPDX-License-Identifier: Apache-2.0
#include "dcnv3_launch.h"

#include "launch.h"

namespace internimage {

cudaError_t launch_dcnv3(const Dcnv3Params& p, DType dtype, int32_t tactic, cudaStream_t stream) {
    return launch(p, dtype, tactic, stream);
}

}  // namespace internimage
