// SPDX-License-Identifier: Apache-2.0
// Messages go to the logger of the TensorRT object that called; without one they are dropped. Nothing is printed.
#pragma once

#include <NvInferRuntime.h>

#include <exception>
#include <string>

namespace internimage {

void log_error(const std::string& message) noexcept;

// Runs `body`, which returns a T; an exception is logged with the names of plugin and function, and becomes `failure`.
template <typename T, typename Body>
T guarded(const char* plugin, const char* function, T failure, Body body) noexcept {
    try {
        return body();
    } catch (const std::exception& error) {
        try {
            log_error(std::string(plugin) + " " + function + ": " + error.what());
        } catch (...) {
        }
    } catch (...) {
    }
    return failure;
}

}  // namespace internimage
