// SPDX-License-Identifier: Apache-2.0
// DCNv3 on the host through a C interface: the kernel's own arithmetic, variants and launch geometry, thread by thread.
#include "dcnv3_host.h"

#include <cstring>

#include "dcnv3_math.h"
#include "host.h"

namespace internimage {
namespace {

// Calls `visit` with every variant of every type until it returns true.
template <typename Visit>
bool visit_variants(Visit visit) {
#define DCNV3_VISIT(T, width, vectors, group, softmax) \
    if (visit(Variant<T, width, vectors, group, softmax>{})) return true;
    DCNV3_VARIANTS_32(DCNV3_VISIT, float)
    DCNV3_VARIANTS_16(DCNV3_VISIT, Half)
    DCNV3_VARIANTS_16(DCNV3_VISIT, BFloat16)
#undef DCNV3_VISIT
    return false;
}

template <typename V>
Choice choice_of() {
    return {dtype_of<typename V::Scalar>(), V::kWidth, V::kVectors, V::kGroupChannels, V::kSoftmax};
}

bool same(const Choice& a, const Choice& b) {
    return a.dtype == b.dtype && a.width == b.width && a.vectors == b.vectors && a.group == b.group &&
           a.softmax == b.softmax;
}

template <typename T>
void convert(const float* from, T* to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = from_float<T>(from[i]);
}

template <typename T>
void widen(const T* from, float* to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = to_float(from[i]);
}

}  // namespace

const char* run_on_host(const Dcnv3Params& p, DType dtype, int32_t tactic, Choice* chosen) {
    if (tactic < 0 || tactic > kTactics) return "no such tactic";
    if (const char* error = parameter_error(p, dtype)) return error;
    const LaunchConfig config = host_config(tactic, output_bytes(p, dtype));
    const Choice choice = choose_variant(p, dtype, config.vectors);
    const Geometry geometry = make_geometry(p, choice, config);
    if (chosen != nullptr) *chosen = choice;
    const bool found = visit_variants([&](auto variant) {
        using V = decltype(variant);
        if (!same(choice, choice_of<V>())) return false;
        for_each_thread(geometry.grid, [&](uint32_t block, int32_t x, int32_t y, int32_t z) {
            run_thread<V>(p, geometry, block, x, y, z);
        });
        return true;
    });
    return found ? nullptr : "no kernel was compiled for the chosen variant";
}

}  // namespace internimage

using namespace internimage;

extern "C" {

int32_t dcnv3_host_params_size() { return sizeof(Dcnv3Params); }

int32_t dcnv3_host_tactics() { return kTactics; }

int32_t dcnv3_host_is_distinct(const Dcnv3Params* p, int32_t dtype, int32_t tactic) {
    return config_is_distinct(*p, static_cast<DType>(dtype), tactic - 1);
}

// `chosen`: the variant's width, vectors, group and softmax. Returns nullptr, or what is wrong.
const char* dcnv3_host_run(const Dcnv3Params* p, int32_t dtype, int32_t tactic, int32_t* chosen) {
    Choice choice{};
    const char* error = run_on_host(*p, static_cast<DType>(dtype), tactic, &choice);
    chosen[0] = choice.width;
    chosen[1] = choice.vectors;
    chosen[2] = choice.group;
    chosen[3] = choice.softmax;
    return error;
}

// Rows of dtype, width, vectors, group, softmax; returns how many there are and writes at most `capacity`.
int32_t dcnv3_host_variants(int32_t* rows, int32_t capacity) {
    int32_t count = 0;
    visit_variants([&](auto variant) {
        const Choice c = choice_of<decltype(variant)>();
        const int32_t row[5] = {static_cast<int32_t>(c.dtype), c.width, c.vectors, c.group, c.softmax};
        if (count < capacity) memcpy(rows + 5 * count, row, sizeof(row));
        ++count;
        return false;
    });
    return count;
}

void dcnv3_host_narrow(const float* from, void* to, int64_t count, int32_t dtype) {
    if (static_cast<DType>(dtype) == DType::kFloat16) {
        convert(from, static_cast<Half*>(to), count);
    } else {
        convert(from, static_cast<BFloat16*>(to), count);
    }
}

void dcnv3_host_widen(const void* from, float* to, int64_t count, int32_t dtype) {
    if (static_cast<DType>(dtype) == DType::kFloat16) {
        widen(static_cast<const Half*>(from), to, count);
    } else {
        widen(static_cast<const BFloat16*>(from), to, count);
    }
}

}  // extern "C"
