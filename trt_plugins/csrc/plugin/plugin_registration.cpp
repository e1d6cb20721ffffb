// SPDX-License-Identifier: Apache-2.0
// The functions that IPluginRegistry::loadLibrary() looks for. Nothing of TensorRT is linked.
#include "plugin_registration.h"

#if DCNV3_PLUGIN_INTERFACE == 3
#include "dcnv3_plugin_v3.h"
#else
#include "dcnv3_plugin_v2.h"
#endif

namespace {

#if DCNV3_PLUGIN_INTERFACE == 3
using Creator = internimage::Dcnv3CreatorV3;
#else
using Creator = internimage::Dcnv3CreatorV2;
#endif

Creator g_creator{false};
Creator g_official_creator{true};

}  // namespace

#if DCNV3_TENSORRT_AT_LEAST(10, 0)
extern "C" DCNV3_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
    static nvinfer1::IPluginCreatorInterface* const creators[] = {&g_creator, &g_official_creator};
    count = 2;
    return creators;
}
#endif

#if DCNV3_PLUGIN_INTERFACE == 2
extern "C" DCNV3_EXPORT nvinfer1::IPluginCreator* const* getPluginCreators(int32_t& count) {
    static nvinfer1::IPluginCreator* const creators[] = {&g_creator, &g_official_creator};
    count = 2;
    return creators;
}
#endif

#if !DCNV3_TENSORRT_AT_LEAST(8, 6)
// TensorRT 8.5 has no loadLibrary(): opening the library registers the plugins, if libnvinfer is in the process.
extern "C" __attribute__((weak)) nvinfer1::IPluginRegistry* getPluginRegistry() noexcept;

namespace {

[[maybe_unused]] const bool g_registered = [] {
    nvinfer1::IPluginRegistry* registry = getPluginRegistry != nullptr ? getPluginRegistry() : nullptr;
    return registry != nullptr && registry->registerCreator(g_creator, internimage::kPluginNamespace) &&
           registry->registerCreator(g_official_creator, internimage::kPluginNamespace);
}();

}  // namespace
#endif
