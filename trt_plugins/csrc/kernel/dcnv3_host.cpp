// SPDX-License-Identifier: Apache-2.0
#include "dcnv3_host.h"

#include "dcnv3_math.h"
#include "host.h"

namespace internimage {
namespace {

template <typename T>
void convert(const float* from, T* to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = from_float<T>(from[i]);
}

template <typename T>
void widen(const T* from, float* to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = to_float(from[i]);
}

}  // namespace

const char* run_on_host(const Dcnv3Params& p, DType dtype, int32_t tactic, Dcnv3Choice* chosen) {
    return run_every_thread(p, dtype, tactic, chosen);
}

}  // namespace internimage

using namespace internimage;

DEFINE_HOST_INTERFACE(dcnv3, Dcnv3Params, Dcnv3Choice)

extern "C" {

int32_t host_tactics() { return kTactics; }

void host_narrow(const float* from, void* to, int64_t count, int32_t dtype) {
    if (static_cast<DType>(dtype) == DType::kFloat16) {
        convert(from, static_cast<Half*>(to), count);
    } else {
        convert(from, static_cast<BFloat16*>(to), count);
    }
}

void host_widen(const void* from, float* to, int64_t count, int32_t dtype) {
    if (static_cast<DType>(dtype) == DType::kFloat16) {
        widen(static_cast<const Half*>(from), to, count);
    } else {
        widen(static_cast<const BFloat16*>(from), to, count);
    }
}

}  // extern "C"
