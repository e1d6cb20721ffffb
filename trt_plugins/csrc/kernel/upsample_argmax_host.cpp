// SPDX-License-Identifier: Apache-2.0
#include "upsample_argmax_host.h"

#include "host.h"
#include "upsample_argmax_math.h"

namespace internimage {

const char* run_on_host(const UpsampleArgmaxParams& p, DType dtype, int32_t tactic, UpsampleArgmaxChoice* chosen) {
    return run_every_thread(p, dtype, tactic, chosen);
}

}  // namespace internimage

DEFINE_HOST_INTERFACE(upsample_argmax, UpsampleArgmaxParams, UpsampleArgmaxChoice)
