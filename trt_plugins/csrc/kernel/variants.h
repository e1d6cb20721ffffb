// SPDX-License-Identifier: Apache-2.0
// What the operators' lists of compiled kernels share. An operator brings, for its parameter block `Params`:
//   Choice         what selects a kernel, with ==
//   VariantsOf     its kernels, each a class with the storage type `Scalar` and the function choice()
//   choose_variant, make_geometry, output_bytes, parameter_error
//   run_thread     the work of one thread, for kernel V{}
#pragma once

#include <utility>

#include "grid.h"

namespace internimage {

template <typename... Variants>
struct VariantList {
    // Calls visit(V{}) for one kernel after another, until a call returns true; whether one did.
    template <typename Visit>
    static bool find(Visit visit) {
        return (visit(Variants{}) || ...);
    }
};

template <typename... A, typename... B>
VariantList<A..., B...> operator+(VariantList<A...>, VariantList<B...>);

// The kernels of an operator for a storage type: VariantsOf<Params, T>::List.
template <typename Params, typename T>
struct VariantsOf;

// Whether configuration `index` comes to another launch for these parameters than every earlier one.
template <typename Params>
bool config_is_distinct(const Params& p, DType dtype, int32_t index) {
    const auto choice_and_grid = [&](int32_t i) {
        const auto choice = choose_variant(p, dtype, kLaunchConfigs[i]);
        return std::pair{choice, grid_of(make_geometry(p, choice, kLaunchConfigs[i]))};
    };
    const auto [choice, grid] = choice_and_grid(index);
    for (int32_t i = 0; i < index; ++i) {
        const auto [other, other_grid] = choice_and_grid(i);
        if (other == choice && other_grid.block_x == grid.block_x && other_grid.block_y == grid.block_y &&
            other_grid.block_z == grid.block_z) {
            return false;
        }
    }
    return true;
}

}  // namespace internimage
