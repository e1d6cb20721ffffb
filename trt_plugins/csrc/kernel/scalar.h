// SPDX-License-Identifier: Apache-2.0
// Storage types, their conversion to and from float, and vector loads and stores, on the device and on the host.
// The conversions are written in PTX: cuda_fp16.h and cuda_bf16.h would do the same, but need a further package.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __CUDACC__
#define KERNEL_HD __host__ __device__ __forceinline__
#define KERNEL_UNROLL _Pragma("unroll")
#else
#define KERNEL_HD inline
#define KERNEL_UNROLL
#endif

namespace internimage {

enum class DType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

inline int64_t scalar_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

inline bool is_known(DType dtype) {
    return dtype == DType::kFloat32 || dtype == DType::kFloat16 || dtype == DType::kBFloat16;
}

struct Half {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};

template <typename T>
constexpr DType dtype_of() {
    if (std::is_same_v<T, float>) return DType::kFloat32;
    return std::is_same_v<T, Half> ? DType::kFloat16 : DType::kBFloat16;
}

template <typename To, typename From>
KERNEL_HD To bit_cast(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
    To to;
    memcpy(&to, &from, sizeof(To));
    return to;
}

KERNEL_HD float to_float(float value) { return value; }

KERNEL_HD float to_float(BFloat16 value) { return bit_cast<float>(uint32_t{value.bits} << 16); }

KERNEL_HD float to_float(Half value) {
#ifdef __CUDA_ARCH__
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
    return result;
#else
    const uint32_t sign = uint32_t{value.bits & 0x8000u} << 16;
    const uint32_t magnitude = value.bits & 0x7fffu;
    if (magnitude >= 0x7c00u) return bit_cast<float>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    // Moving the exponent by a multiplication also makes subnormals right: 2^112 = 2^(127 - 15).
    return bit_cast<float>(sign | bit_cast<uint32_t>(bit_cast<float>(magnitude << 13) * 0x1p112f));
#endif
}

template <typename T>
KERNEL_HD T from_float(float value);

template <>
KERNEL_HD float from_float<float>(float value) {
    return value;
}

// Both narrow conversions round to nearest, ties to even.
template <>
KERNEL_HD BFloat16 from_float<BFloat16>(float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    BFloat16 result;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
    return result;
#else
    const uint32_t bits = bit_cast<uint32_t>(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {uint16_t((bits >> 16) | 0x40u)};  // NaN stays NaN
    return {uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
#endif
}

template <>
KERNEL_HD Half from_float<Half>(float value) {
#ifdef __CUDA_ARCH__
    Half result;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
    return result;
#else
    const uint32_t bits = bit_cast<uint32_t>(value);
    const uint16_t sign = uint16_t((bits >> 16) & 0x8000u);
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return {uint16_t(sign | 0x7e00u)};
    if (magnitude >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};  // rounds to 65520 or more: infinity
    if (magnitude < 0x38800000u) {
        // Subnormal: adding 0.5 puts the float's last bit at 2^-24, the half's, so the FPU does the rounding.
        const float shifted = bit_cast<float>(magnitude) + 0.5f;
        return {uint16_t(sign | (bit_cast<uint32_t>(shifted) - 0x3f000000u))};
    }
    const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
    return {uint16_t(sign | ((rounded - 0x38000000u) >> 13))};
#endif
}

// N neighbouring values, moved in one access. They are kept as whole words: taking 16-bit halves out of a register
// and putting them back costs an instruction each, converting a pair at a time does not.
template <typename T, int N>
struct Pack {
    using Bits = std::conditional_t<sizeof(T) * N == 2, uint16_t, uint32_t>;
    static constexpr int kWords = sizeof(T) * N / sizeof(Bits);
    static constexpr int kPerWord = N / kWords;
    Bits word[kWords];
};

KERNEL_HD void unpack(const Pack<Half, 1>& pack, float* values) { values[0] = to_float(Half{pack.word[0]}); }

KERNEL_HD void unpack(const Pack<BFloat16, 1>& pack, float* values) { values[0] = to_float(BFloat16{pack.word[0]}); }

template <int N>
KERNEL_HD void unpack(const Pack<float, N>& pack, float* values) {
    KERNEL_UNROLL
    for (int i = 0; i < N; ++i) values[i] = bit_cast<float>(pack.word[i]);
}

template <int N>
KERNEL_HD void unpack(const Pack<BFloat16, N>& pack, float* values) {
    KERNEL_UNROLL
    for (int i = 0; i < N / 2; ++i) {
        values[2 * i] = bit_cast<float>(pack.word[i] << 16);
        values[2 * i + 1] = bit_cast<float>(pack.word[i] & 0xffff0000u);
    }
}

template <int N>
KERNEL_HD void unpack(const Pack<Half, N>& pack, float* values) {
    KERNEL_UNROLL
    for (int i = 0; i < N / 2; ++i) {
#ifdef __CUDA_ARCH__
        asm("{.reg .f16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high;}"
            : "=f"(values[2 * i]), "=f"(values[2 * i + 1])
            : "r"(pack.word[i]));
#else
        values[2 * i] = to_float(Half{uint16_t(pack.word[i])});
        values[2 * i + 1] = to_float(Half{uint16_t(pack.word[i] >> 16)});
#endif
    }
}

template <typename T>
KERNEL_HD float only(const Pack<T, 1>& pack) {
    float value;
    unpack(pack, &value);
    return value;
}

template <typename T, int N>
KERNEL_HD Pack<T, N> pack_values(const float* values) {
    Pack<T, N> pack;
    KERNEL_UNROLL
    for (int i = 0; i < Pack<T, N>::kWords; ++i) {
        if constexpr (Pack<T, N>::kPerWord == 1) {
            pack.word[i] = bit_cast<typename Pack<T, N>::Bits>(from_float<T>(values[i]));
        } else {
            pack.word[i] = uint32_t{from_float<T>(values[2 * i]).bits} | uint32_t{from_float<T>(values[2 * i + 1]).bits}
                                                                             << 16;
        }
    }
    return pack;
}

#ifdef __CUDA_ARCH__
template <int kBytes>
struct Word;
template <>
struct Word<2> {
    using Type = unsigned short;
};
template <>
struct Word<4> {
    using Type = unsigned int;
};
template <>
struct Word<8> {
    using Type = uint2;
};
template <>
struct Word<16> {
    using Type = uint4;
};
#endif

// `address` is aligned to the pack's size.
template <typename P>
KERNEL_HD P load(const void* address) {
#ifdef __CUDA_ARCH__
    return bit_cast<P>(__ldg(static_cast<const typename Word<sizeof(P)>::Type*>(address)));
#else
    P pack;
    memcpy(&pack, address, sizeof(P));
    return pack;
#endif
}

template <typename P>
KERNEL_HD void store(void* address, const P& pack) {
#ifdef __CUDA_ARCH__
    *static_cast<typename Word<sizeof(P)>::Type*>(address) = bit_cast<typename Word<sizeof(P)>::Type>(pack);
#else
    memcpy(address, &pack, sizeof(P));
#endif
}

template <typename P>
KERNEL_HD P zeros() {
    P pack{};
    return pack;
}

inline bool aligned(const void* pointer, int64_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

}  // namespace internimage
