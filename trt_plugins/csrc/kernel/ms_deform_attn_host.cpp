// SPDX-License-Identifier: Apache-2.0
#include "ms_deform_attn_host.h"

#include "host.h"
#include "ms_deform_attn_math.h"

namespace internimage {

const char* run_on_host(const MsDeformAttnParams& p, DType dtype, int32_t tactic, MsDeformAttnChoice* chosen) {
    return run_every_thread(p, dtype, tactic, chosen);
}

}  // namespace internimage

DEFINE_HOST_INTERFACE(ms_deform_attn, MsDeformAttnParams, MsDeformAttnChoice)
