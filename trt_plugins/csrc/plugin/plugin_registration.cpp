// SPDX-License-Identifier: Apache-2.0
// The functions that IPluginRegistry::loadLibrary() looks for. Nothing of TensorRT is linked.
#include "plugin_registration.h"

#include "dcnv3_operator.h"
#include "ms_deform_attn_operator.h"
#include "upsample_argmax_operator.h"
#if PLUGIN_INTERFACE == 3
#include "plugin_v3.h"
#else
#include "plugin_v2.h"
#endif

namespace {

#if PLUGIN_INTERFACE == 3
using Creator = internimage::CreatorV3;
#else
using Creator = internimage::CreatorV2;
#endif

Creator g_creators[] = {Creator{internimage::kDcnv3}, Creator{internimage::kPackedDcnv3},
                        Creator{internimage::kOfficialDcnv3}, Creator{internimage::kMsDeformAttn},
                        Creator{internimage::kUpsampleArgmax}};
constexpr int32_t kCreators = sizeof(g_creators) / sizeof(g_creators[0]);

}  // namespace

#if PLUGIN_TENSORRT_AT_LEAST(10, 0)
extern "C" PLUGIN_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
    static nvinfer1::IPluginCreatorInterface* const creators[kCreators] = {
        &g_creators[0], &g_creators[1], &g_creators[2], &g_creators[3], &g_creators[4]};
    count = kCreators;
    return creators;
}
#endif

#if PLUGIN_INTERFACE == 2
extern "C" PLUGIN_EXPORT nvinfer1::IPluginCreator* const* getPluginCreators(int32_t& count) {
    static nvinfer1::IPluginCreator* const creators[kCreators] = {&g_creators[0], &g_creators[1], &g_creators[2],
                                                                  &g_creators[3], &g_creators[4]};
    count = kCreators;
    return creators;
}
#endif

// Which TensorRT may take this library: the classes of 8 and 9 and those of 10 and later differ in memory, and a
// registry that is given the wrong ones crashes. Whoever loads the library asks this first.
#define PLUGIN_TEXT_OF(value) #value
#define PLUGIN_TEXT(macro) PLUGIN_TEXT_OF(macro)
extern "C" PLUGIN_EXPORT const char* internimage_plugin_built_for() {
    return PLUGIN_TEXT(NV_TENSORRT_MAJOR) "." PLUGIN_TEXT(NV_TENSORRT_MINOR) "." PLUGIN_TEXT(
        NV_TENSORRT_PATCH) " v" PLUGIN_TEXT(PLUGIN_INTERFACE);
}

#if !PLUGIN_TENSORRT_AT_LEAST(8, 6)
// TensorRT 8.5 has no loadLibrary(): opening the library registers the plugins, if libnvinfer is in the process.
extern "C" __attribute__((weak)) nvinfer1::IPluginRegistry* getPluginRegistry() noexcept;
extern "C" __attribute__((weak)) int32_t getInferLibVersion() noexcept;

namespace {

[[maybe_unused]] const bool g_registered = [] {
    const bool here = getPluginRegistry != nullptr && getInferLibVersion != nullptr &&
                      getInferLibVersion() / 100 == NV_TENSORRT_MAJOR * 10 + NV_TENSORRT_MINOR;
    nvinfer1::IPluginRegistry* registry = here ? getPluginRegistry() : nullptr;
    bool registered = registry != nullptr;
    for (Creator& creator : g_creators) {
        registered = registered && registry->registerCreator(creator, internimage::kPluginNamespace);
    }
    return registered;
}();

}  // namespace
#endif
