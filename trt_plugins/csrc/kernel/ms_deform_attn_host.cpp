// SPDX-License-Identifier: Apache-2.0
// MSDeformAttn on the host through a C interface: the kernel's own arithmetic, variants and launch geometry, thread by
// thread.
#include "ms_deform_attn_host.h"

#include <cstring>

#include "host.h"
#include "ms_deform_attn_math.h"

namespace internimage {
namespace {

// Calls `visit` with every variant of every type until it returns true.
template <typename Visit>
bool visit_variants(Visit visit) {
#define MS_DEFORM_ATTN_VISIT(T, width, vectors, points) \
    if (visit(MsDeformAttnVariant<T, width, vectors, points>{})) return true;
    MS_DEFORM_ATTN_VARIANTS_32(MS_DEFORM_ATTN_VISIT, float)
    MS_DEFORM_ATTN_VARIANTS_16(MS_DEFORM_ATTN_VISIT, Half)
    MS_DEFORM_ATTN_VARIANTS_16(MS_DEFORM_ATTN_VISIT, BFloat16)
#undef MS_DEFORM_ATTN_VISIT
    return false;
}

template <typename V>
MsDeformAttnChoice choice_of() {
    return {dtype_of<typename V::Scalar>(), V::kWidth, V::kVectors, V::kPoints};
}

bool same(const MsDeformAttnChoice& a, const MsDeformAttnChoice& b) {
    return a.dtype == b.dtype && a.width == b.width && a.vectors == b.vectors && a.points == b.points;
}

}  // namespace

const char* run_on_host(const MsDeformAttnParams& p, DType dtype, int32_t tactic, MsDeformAttnChoice* chosen) {
    if (tactic < 0 || tactic > kTactics) return "no such tactic";
    if (const char* error = parameter_error(p, dtype)) return error;
    const LaunchConfig config = host_config(tactic, output_bytes(p, dtype));
    const MsDeformAttnChoice choice = choose_variant(p, dtype, config.vectors);
    const Grid grid = make_grid(p, choice, config);
    if (chosen != nullptr) *chosen = choice;
    const bool found = visit_variants([&](auto variant) {
        using V = decltype(variant);
        if (!same(choice, choice_of<V>())) return false;
        for_each_thread(
            grid, [&](uint32_t block, int32_t x, int32_t y, int32_t z) { run_thread<V>(p, grid, block, x, y, z); });
        return true;
    });
    return found ? nullptr : "no kernel was compiled for the chosen variant";
}

}  // namespace internimage

using namespace internimage;

extern "C" {

int32_t ms_deform_attn_host_params_size() { return sizeof(MsDeformAttnParams); }

int32_t ms_deform_attn_host_is_distinct(const MsDeformAttnParams* p, int32_t dtype, int32_t tactic) {
    return config_is_distinct(*p, static_cast<DType>(dtype), tactic - 1);
}

// `chosen`: the variant's width, vectors and points. Returns nullptr, or what is wrong.
const char* ms_deform_attn_host_run(const MsDeformAttnParams* p, int32_t dtype, int32_t tactic, int32_t* chosen) {
    MsDeformAttnChoice choice{};
    const char* error = run_on_host(*p, static_cast<DType>(dtype), tactic, &choice);
    chosen[0] = choice.width;
    chosen[1] = choice.vectors;
    chosen[2] = choice.points;
    return error;
}

// Rows of dtype, width, vectors, points; returns how many there are and writes at most `capacity`.
int32_t ms_deform_attn_host_variants(int32_t* rows, int32_t capacity) {
    int32_t count = 0;
    visit_variants([&](auto variant) {
        const MsDeformAttnChoice c = choice_of<decltype(variant)>();
        const int32_t row[4] = {static_cast<int32_t>(c.dtype), c.width, c.vectors, c.points};
        if (count < capacity) memcpy(rows + 4 * count, row, sizeof(row));
        ++count;
        return false;
    });
    return count;
}

}  // extern "C"
