// SPDX-License-Identifier: Apache-2.0
// A host that only opens libraries, as Triton does, and then uses what a TensorRT library has in its registry.
//
//   registry_probe TENSORRT LIBRARY...    opens them in this order and prints "NAME VALUE" lines
//
// TENSORRT "-" opens none. Of a creator or plugin it uses what IPluginV3 promises alike in TensorRT 10 and 11.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "register/tensorrt_layout.h"

using namespace nvinfer1;

namespace {

template <typename Function>
Function* symbol(void* library, const char* name) {
    return reinterpret_cast<Function*>(dlsym(library, name));
}

template <typename Registry>
std::vector<IPluginCreatorV3One*> creators_in(void* registry) {
    std::vector<IPluginCreatorV3One*> found;
    int32_t count = 0;
    void* const* list = static_cast<Registry*>(registry)->list(&count);
    for (int32_t i = 0; i < count; ++i) {
        auto* creator = static_cast<IPluginCreatorInterface*>(list[i]);
        if (strcmp(creator->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE") == 0) {
            found.push_back(static_cast<IPluginCreatorV3One*>(creator));
        }
    }
    return found;
}

PluginTensorDesc tensor(std::vector<int64_t> dims, DataType type) {
    PluginTensorDesc desc{};
    desc.dims.nbDims = static_cast<int32_t>(dims.size());
    for (size_t i = 0; i < dims.size(); ++i) desc.dims.d[i] = dims[i];
    desc.type = type;
    desc.format = TensorFormat::kLINEAR;
    return desc;
}

void say(const char* phase, const char* what, long value) { printf("%s.%s %ld\n", phase, what, value); }

void use(IPluginV3* plugin, IPluginCreatorV3One* creator, const char* phase) {
    auto* core = static_cast<IPluginV3OneCore*>(plugin->getCapabilityInterface(PluginCapabilityType::kCORE));
    auto* build = static_cast<IPluginV3OneBuild*>(plugin->getCapabilityInterface(PluginCapabilityType::kBUILD));
    auto* runtime = static_cast<IPluginV3OneRuntime*>(plugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    say(phase, "capabilities", (core != nullptr) + (build != nullptr) + (runtime != nullptr));

    const std::vector<PluginTensorDesc> half = {
        tensor({2, 6, 7, 8}, DataType::kHALF), tensor({2, 6, 7, 36}, DataType::kHALF),
        tensor({2, 6, 7, 18}, DataType::kHALF), tensor({2, 6, 7, 8}, DataType::kHALF)};
    std::vector<DynamicPluginTensorDesc> dynamic(4);
    for (int i = 0; i < 4; ++i) dynamic[i] = {half[i], half[i].dims, half[i].dims, half[i].dims};
    long formats = 0;
    for (int i = 0; i < 4; ++i) formats += build->supportsFormatCombination(i, dynamic.data(), 3, 1);
    say(phase, "formats", formats);
    dynamic[2].desc.type = DataType::kFLOAT;
    say(phase, "mixed_types", build->supportsFormatCombination(2, dynamic.data(), 3, 1));
    dynamic[2].desc.type = DataType::kHALF;
    say(phase, "configure", build->configurePlugin(dynamic.data(), 3, dynamic.data() + 3, 1));
    std::vector<int32_t> tactics(build->getNbTactics());
    say(phase, "tactics", static_cast<long>(tactics.size()));
    say(phase, "valid_tactics", build->getValidTactics(tactics.data(), static_cast<int32_t>(tactics.size())));
    say(phase, "set_tactic", runtime->setTactic(tactics.back()));
    say(phase, "set_unknown_tactic", runtime->setTactic(1000));

    // What an engine keeps is made a plugin again, as a runtime does it.
    const PluginFieldCollection* fields = runtime->getFieldsToSerialize();
    std::unique_ptr<IPluginV3> loaded(creator->createPlugin("layer", fields, TensorRTPhase::kRUNTIME));
    say(phase, "reloaded", loaded != nullptr);
    std::unique_ptr<IPluginV3> clone(loaded->clone());
    auto* last = static_cast<IPluginV3OneRuntime*>(clone->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    const PluginFieldCollection* again = last->getFieldsToSerialize();
    bool same = again->nbFields == fields->nbFields;
    for (int i = 0; same && i < fields->nbFields; ++i) {
        same = strcmp(fields->fields[i].name, again->fields[i].name) == 0 &&
               memcmp(fields->fields[i].data, again->fields[i].data, 4) == 0;  // one int32 or float each
    }
    say(phase, "same_fields", same);
    say(phase, "shape_change", last->onShapeChange(half.data(), 3, half.data() + 3, 1));
    std::vector<PluginTensorDesc> wrong = half;
    wrong[1].dims.d[3] = 35;
    say(phase, "wrong_shape", last->onShapeChange(wrong.data(), 3, wrong.data() + 3, 1));
    // Addresses that no GPU has: with no driver the launch must fail and say so.
    const void* inputs[3] = {nullptr, nullptr, nullptr};
    void* outputs[1] = {nullptr};
    say(phase, "enqueue", last->enqueue(half.data(), half.data() + 3, inputs, outputs, nullptr, nullptr));
}

}  // namespace

int main(int argc, char** argv) {
    setvbuf(stdout, nullptr, _IOLBF, 0);
    void* tensorrt = nullptr;
    for (int i = 1; i < argc; ++i) {
        if (strcmp(argv[i], "-") == 0) continue;
        void* opened = dlopen(argv[i], RTLD_LAZY);
        if (opened == nullptr) {
            printf("failed %s\n", dlerror());
            return 1;
        }
        if (i == 1) tensorrt = opened;
    }
    if (tensorrt == nullptr) return 0;
    const int32_t version = symbol<int32_t()>(tensorrt, "getInferLibVersion")();
    void* registry = symbol<void*()>(tensorrt, "getPluginRegistry")();
    std::vector<IPluginCreatorV3One*> creators;
    if (version / 10000 == 11) {
        creators = creators_in<internimage::Registry11>(registry);
    } else {
        creators = creators_in<internimage::Registry10>(registry);
    }
    say("registry", "version", version / 10000);
    IPluginCreatorV3One* dcnv3 = nullptr;
    for (IPluginCreatorV3One* creator : creators) {
        printf("creator %s %s '%s'\n", creator->getPluginName(), creator->getPluginVersion(),
               creator->getPluginNamespace());
        if (strcmp(creator->getPluginName(), "DCNv3") == 0) dcnv3 = creator;
    }
    if (dcnv3 == nullptr) return 0;
    const int32_t group = 2;
    const int32_t channels = 4;
    const PluginField fields[] = {{"group", &group, PluginFieldType::kINT32, 1},
                                  {"group_channels", &channels, PluginFieldType::kINT32, 1}};
    const PluginFieldCollection all{2, fields};
    const PluginFieldCollection some{1, fields};
    for (const auto& [phase, name] :
         {std::pair{TensorRTPhase::kBUILD, "build"}, {TensorRTPhase::kRUNTIME, "runtime"}}) {
        std::unique_ptr<IPluginV3> plugin(dcnv3->createPlugin("layer", &all, phase));
        say(name, "created", plugin != nullptr);
        if (plugin != nullptr) use(plugin.get(), dcnv3, name);
        std::unique_ptr<IPluginV3> refused(dcnv3->createPlugin("layer", &some, phase));
        say(name, "created_without_channels", refused != nullptr);
    }
    return 0;
}
