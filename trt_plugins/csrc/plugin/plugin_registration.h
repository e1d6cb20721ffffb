// SPDX-License-Identifier: Apache-2.0
// What the library shows to TensorRT. Everything else is hidden.
#pragma once

#include <NvInferRuntime.h>
#include <NvInferVersion.h>

#define PLUGIN_EXPORT __attribute__((visibility("default")))
#define PLUGIN_TENSORRT_AT_LEAST(major, minor) \
    (NV_TENSORRT_MAJOR > (major) || (NV_TENSORRT_MAJOR == (major) && NV_TENSORRT_MINOR >= (minor)))
#define PLUGIN_HAS_LOGGER_FINDER PLUGIN_TENSORRT_AT_LEAST(8, 6)

// 2: IPluginV2DynamicExt, 3: IPluginV3. CMake's option of the same name sets it.
#ifndef PLUGIN_INTERFACE
#if PLUGIN_TENSORRT_AT_LEAST(10, 0)
#define PLUGIN_INTERFACE 3
#else
#define PLUGIN_INTERFACE 2
#endif
#endif

namespace internimage {

constexpr const char* kPluginVersion = "1";
constexpr const char* kPluginNamespace = "";

}  // namespace internimage
