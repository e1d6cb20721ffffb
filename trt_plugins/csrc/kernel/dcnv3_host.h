// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "dcnv3_variants.h"

namespace internimage {

// What launch_dcnv3() does, with host addresses. `chosen` may be nullptr. Returns nullptr, or what is wrong.
const char* run_on_host(const Dcnv3Params& p, DType dtype, int32_t tactic, Dcnv3Choice* chosen);

}  // namespace internimage
