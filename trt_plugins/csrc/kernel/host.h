// SPDX-License-Identifier: Apache-2.0
// An operator on the host: the kernel's own arithmetic, variants and launch geometry, one thread after another, and the
// C interface that the tests call it through.
#pragma once

#include <cstring>

#include "variants.h"

namespace internimage {

// A made-up GPU size for the default configuration: that of a desktop card.
constexpr int32_t kHostMultiprocessors = 64;

// Calls visit(V{}) with every kernel of an operator, of any type, until a call returns true.
template <typename Params, typename Visit>
bool find_variant(Visit visit) {
    return VariantsOf<Params, float>::List::find(visit) || VariantsOf<Params, Half>::List::find(visit) ||
           VariantsOf<Params, BFloat16>::List::find(visit);
}

// What launch() does, with host addresses. `chosen` may be nullptr. Returns nullptr, or what is wrong.
template <typename Params, typename Choice>
const char* run_every_thread(const Params& p, DType dtype, int32_t tactic, Choice* chosen) {
    if (tactic < 0 || tactic > kTactics) return "no such tactic";
    if (const char* error = parameter_error(p, dtype)) return error;
    const LaunchConfig config =
        tactic > 0 ? kLaunchConfigs[tactic - 1] : default_config(output_bytes(p, dtype), kHostMultiprocessors);
    const Choice choice = choose_variant(p, dtype, config);
    if (chosen != nullptr) *chosen = choice;
    const auto geometry = make_geometry(p, choice, config);
    const Grid& g = grid_of(geometry);
    const bool found = find_variant<Params>([&](auto variant) {
        using V = decltype(variant);
        if (!(V::choice() == choice)) return false;
        for (int64_t block = 0; block < g.blocks; ++block) {
            for (int32_t z = 0; z < g.block_z; ++z) {
                for (int32_t y = 0; y < g.block_y; ++y) {
                    for (int32_t x = 0; x < g.block_x; ++x) {
                        run_thread(V{}, p, geometry, static_cast<uint32_t>(block), x, y, z);
                    }
                }
            }
        }
        return true;
    });
    return found ? nullptr : "no kernel was compiled for the chosen variant";
}

// Writes the choices of at most `capacity` kernels and returns how many there are.
template <typename Params, typename Choice>
int32_t list_variants(Choice* choices, int32_t capacity) {
    int32_t count = 0;
    find_variant<Params>([&](auto variant) {
        if (count < capacity) choices[count] = decltype(variant)::choice();
        ++count;
        return false;
    });
    return count;
}

}  // namespace internimage

// The C functions NAME_host_{params_size, is_distinct, run, variants}. `run` returns nullptr, or what is wrong.
#define DEFINE_HOST_INTERFACE(NAME, PARAMS, CHOICE)                                                \
    extern "C" {                                                                                   \
    int32_t NAME##_host_params_size() { return sizeof(internimage::PARAMS); }                      \
    int32_t NAME##_host_is_distinct(const internimage::PARAMS* p, int32_t dtype, int32_t tactic) { \
        return config_is_distinct(*p, static_cast<internimage::DType>(dtype), tactic - 1);         \
    }                                                                                              \
    const char* NAME##_host_run(const internimage::PARAMS* p, int32_t dtype, int32_t tactic,       \
                                internimage::CHOICE* chosen) {                                     \
        return run_on_host(*p, static_cast<internimage::DType>(dtype), tactic, chosen);            \
    }                                                                                              \
    int32_t NAME##_host_variants(internimage::CHOICE* choices, int32_t capacity) {                 \
        return internimage::list_variants<internimage::PARAMS>(choices, capacity);                 \
    }                                                                                              \
    }
