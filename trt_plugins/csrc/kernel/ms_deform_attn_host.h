// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "ms_deform_attn_variants.h"

namespace internimage {

// What launch_ms_deform_attn() does, with host addresses. `chosen` may be nullptr. Returns nullptr, or what is wrong.
const char* run_on_host(const MsDeformAttnParams& p, DType dtype, int32_t tactic, MsDeformAttnChoice* chosen);

}  // namespace internimage
