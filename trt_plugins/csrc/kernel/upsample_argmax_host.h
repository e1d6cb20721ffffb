// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "upsample_argmax_variants.h"

namespace internimage {

// What launch_upsample_argmax() does, with host addresses. `chosen` may be nullptr. Returns nullptr, or what is wrong.
const char* run_on_host(const UpsampleArgmaxParams& p, DType dtype, int32_t tactic, UpsampleArgmaxChoice* chosen);

}  // namespace internimage
