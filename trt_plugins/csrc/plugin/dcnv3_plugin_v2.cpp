// SPDX-License-Identifier: Apache-2.0
#include "dcnv3_plugin_v2.h"

#include <cstring>
#include <memory>
#include <vector>

#include "plugin_log.h"
#include "plugin_registration.h"

namespace internimage {

using namespace nvinfer1;

namespace {

// What an engine holds of a plugin. The tag tells a foreign or truncated blob from ours.
struct Blob {
    uint32_t tag;
    Attributes attributes;
};
constexpr uint32_t kTag = 0x33564344;  // "DCV3", first layout

}  // namespace

Dcnv3PluginV2::Dcnv3PluginV2(const Attributes& attributes, std::string layer, const char* name)
    : operator_(attributes, std::move(layer)), name_(name), namespace_(kPluginNamespace) {}

IPluginV2DynamicExt* Dcnv3PluginV2::clone() const noexcept {
    return guarded<IPluginV2DynamicExt*>("DCNv3 clone", nullptr, [&] {
        auto copy = std::make_unique<Dcnv3PluginV2>(operator_.attributes(), operator_.layer(), name_);
        copy->namespace_ = namespace_;
        return copy.release();
    });
}

DimsExprs Dcnv3PluginV2::getOutputDimensions(int32_t /*outputIndex*/, const DimsExprs* inputs, int32_t nbInputs,
                                             IExprBuilder& exprBuilder) noexcept {
    // Zero dimensions are how this interface says that it failed.
    return guarded("DCNv3 getOutputDimensions", DimsExprs{}, [&] {
        if (nbInputs != kInputs || inputs[kInputIdx].nbDims != 4) {
            log_error(operator_.named("expected 3 inputs (input, offset, mask), the first of 4 dimensions"));
            return DimsExprs{};
        }
        return operator_.output_shape(inputs[kInputIdx], exprBuilder);
    });
}

bool Dcnv3PluginV2::supportsFormatCombination(int32_t pos, const PluginTensorDesc* inOut, int32_t nbInputs,
                                              int32_t nbOutputs) noexcept {
    return Dcnv3Operator::supports(pos, inOut, nbInputs, nbOutputs);
}

void Dcnv3PluginV2::configurePlugin(const DynamicPluginTensorDesc* in, int32_t nbInputs,
                                    const DynamicPluginTensorDesc* out, int32_t nbOutputs) noexcept {
    // The interface cannot refuse here; enqueue checks again and does.
    guarded("DCNv3 configurePlugin", 0, [&] {
        std::vector<PluginTensorDesc> inputs;
        std::vector<PluginTensorDesc> outputs;
        for (int32_t i = 0; i < nbInputs; ++i) inputs.push_back(in[i].desc);
        for (int32_t i = 0; i < nbOutputs; ++i) outputs.push_back(out[i].desc);
        const std::string error = operator_.shape_error(inputs.data(), nbInputs, outputs.data(), nbOutputs);
        if (!error.empty()) log_error(error);
        return 0;
    });
}

size_t Dcnv3PluginV2::getWorkspaceSize(const PluginTensorDesc* /*inputs*/, int32_t /*nbInputs*/,
                                       const PluginTensorDesc* /*outputs*/, int32_t /*nbOutputs*/) const noexcept {
    return 0;
}

int32_t Dcnv3PluginV2::enqueue(const PluginTensorDesc* inputDesc, const PluginTensorDesc* outputDesc,
                               const void* const* inputs, void* const* outputs, void* /*workspace*/,
                               cudaStream_t stream) noexcept {
    // This interface has no tactics: 0 lets the launch choose by size.
    return guarded<int32_t>("DCNv3 enqueue", -1,
                            [&] { return operator_.enqueue(inputDesc, outputDesc, inputs, outputs, 0, stream); });
}

DataType Dcnv3PluginV2::getOutputDataType(int32_t /*index*/, const DataType* inputTypes,
                                          int32_t /*nbInputs*/) const noexcept {
    return inputTypes[kInputIdx];
}

const char* Dcnv3PluginV2::getPluginType() const noexcept { return name_; }

const char* Dcnv3PluginV2::getPluginVersion() const noexcept { return kPluginVersion; }

int32_t Dcnv3PluginV2::getNbOutputs() const noexcept { return kOutputs; }

int32_t Dcnv3PluginV2::initialize() noexcept { return 0; }

void Dcnv3PluginV2::terminate() noexcept {}

size_t Dcnv3PluginV2::getSerializationSize() const noexcept { return sizeof(Blob); }

void Dcnv3PluginV2::serialize(void* buffer) const noexcept {
    const Blob blob{kTag, operator_.attributes()};
    memcpy(buffer, &blob, sizeof(blob));
}

void Dcnv3PluginV2::destroy() noexcept { delete this; }

void Dcnv3PluginV2::setPluginNamespace(const char* pluginNamespace) noexcept {
    guarded("DCNv3 setPluginNamespace", 0, [&] {
        namespace_ = pluginNamespace != nullptr ? pluginNamespace : "";
        return 0;
    });
}

const char* Dcnv3PluginV2::getPluginNamespace() const noexcept { return namespace_.c_str(); }

const char* Dcnv3CreatorV2::getPluginName() const noexcept { return official_ ? kOfficialPluginName : kPluginName; }

const char* Dcnv3CreatorV2::getPluginVersion() const noexcept { return kPluginVersion; }

const PluginFieldCollection* Dcnv3CreatorV2::getFieldNames() noexcept {
    return guarded<const PluginFieldCollection*>("DCNv3 getFieldNames", nullptr,
                                                 [&] { return attribute_names(official_); });
}

IPluginV2* Dcnv3CreatorV2::make(const Attributes& attributes, const char* layer) const {
    auto plugin = std::make_unique<Dcnv3PluginV2>(attributes, layer != nullptr ? layer : "", getPluginName());
    plugin->setPluginNamespace(namespace_.c_str());
    return plugin.release();
}

IPluginV2* Dcnv3CreatorV2::createPlugin(const char* name, const PluginFieldCollection* fc) noexcept {
    return guarded<IPluginV2*>("DCNv3 createPlugin", nullptr, [&]() -> IPluginV2* {
        Attributes attributes{};
        return create_operator(name, fc, attributes) ? make(attributes, name) : nullptr;
    });
}

IPluginV2* Dcnv3CreatorV2::deserializePlugin(const char* name, const void* serialData, size_t serialLength) noexcept {
    return guarded<IPluginV2*>("DCNv3 deserializePlugin", nullptr, [&]() -> IPluginV2* {
        Blob blob{};
        if (serialData != nullptr && serialLength == sizeof(blob)) memcpy(&blob, serialData, sizeof(blob));
        if (blob.tag != kTag) {
            log_error("DCNv3 '" + std::string(name != nullptr ? name : "") + "': " + std::to_string(serialLength) +
                      " bytes in the engine are not this plugin's: rebuild the engine");
            return nullptr;
        }
        // An engine is a file and may be damaged: its attributes pass the same checks as a parser's.
        const std::vector<PluginField> fields = attribute_fields(blob.attributes);
        const PluginFieldCollection collection{static_cast<int32_t>(fields.size()), fields.data()};
        return createPlugin(name, &collection);
    });
}

void Dcnv3CreatorV2::setPluginNamespace(const char* pluginNamespace) noexcept {
    guarded("DCNv3 setPluginNamespace", 0, [&] {
        namespace_ = pluginNamespace != nullptr ? pluginNamespace : "";
        return 0;
    });
}

const char* Dcnv3CreatorV2::getPluginNamespace() const noexcept { return namespace_.c_str(); }

}  // namespace internimage
