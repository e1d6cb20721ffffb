// SPDX-License-Identifier: Apache-2.0
// What the library shows to TensorRT. Everything else is hidden.
#pragma once

#include <NvInferRuntime.h>
#include <NvInferVersion.h>

#define DCNV3_EXPORT __attribute__((visibility("default")))
#define DCNV3_TENSORRT_AT_LEAST(major, minor) \
    (NV_TENSORRT_MAJOR > (major) || (NV_TENSORRT_MAJOR == (major) && NV_TENSORRT_MINOR >= (minor)))
#define DCNV3_HAS_LOGGER_FINDER DCNV3_TENSORRT_AT_LEAST(8, 6)

// 2: IPluginV2DynamicExt, 3: IPluginV3. CMake's option DCNV3_INTERFACE sets it.
#ifndef DCNV3_PLUGIN_INTERFACE
#define DCNV3_PLUGIN_INTERFACE (DCNV3_TENSORRT_AT_LEAST(10, 0) ? 3 : 2)
#endif

namespace internimage {

constexpr const char* kPluginName = "DCNv3";
constexpr const char* kOfficialPluginName = "TRTDCNv3";  // what InternImage's own exporter writes
constexpr const char* kPluginVersion = "1";
constexpr const char* kPluginNamespace = "";

}  // namespace internimage
