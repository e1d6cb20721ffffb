// SPDX-License-Identifier: Apache-2.0
// Two halves in one register: the arithmetic of Body::kHalf, on the device and on the host.
#pragma once

#include <cmath>

#include "scalar.h"

namespace internimage {

struct HalfPair {
    uint32_t bits;
};

// (value, value), each rounded to nearest.
KERNEL_HD HalfPair pair_of(float value) {
#ifdef __CUDA_ARCH__
    HalfPair result;
    asm("{.reg .f16 h; cvt.rn.f16.f32 h, %1; mov.b32 %0, {h, h};}" : "=r"(result.bits) : "f"(value));
    return result;
#else
    return {from_float<Half>(value).bits * 0x10001u};
#endif
}

// a * b + c in each half, rounded once. The host rounds to float in between: a last bit may differ.
KERNEL_HD HalfPair fma_pairs(HalfPair a, HalfPair b, HalfPair c) {
#ifdef __CUDA_ARCH__
    HalfPair result;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result.bits) : "r"(a.bits), "r"(b.bits), "r"(c.bits));
    return result;
#else
    const auto half = [&](int shift) {
        const auto part = [&](HalfPair pair) { return to_float(Half{uint16_t(pair.bits >> shift)}); };
        return uint32_t{from_float<Half>(std::fmaf(part(a), part(b), part(c))).bits} << shift;
    };
    return {half(0) | half(16)};
#endif
}

KERNEL_HD HalfPair mul_pairs(HalfPair a, HalfPair b) {
#ifdef __CUDA_ARCH__
    HalfPair result;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(result.bits) : "r"(a.bits), "r"(b.bits));
    return result;
#else
    return fma_pairs(a, b, {0});
#endif
}

}  // namespace internimage
