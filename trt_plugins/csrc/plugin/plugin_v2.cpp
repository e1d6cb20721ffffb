// SPDX-License-Identifier: Apache-2.0
// Empty for interface 3, as plugin_v3.cpp is for interface 2: one list of sources serves every TensorRT.
#include "plugin_registration.h"

#if PLUGIN_INTERFACE == 2
#include <cstring>
#include <memory>
#include <vector>

#include "plugin_log.h"
#include "plugin_v2.h"

namespace internimage {

using namespace nvinfer1;

PluginV2::PluginV2(std::unique_ptr<Operator> op)
    : operator_(std::move(op)), bytes_(operator_->serialize()), namespace_(kPluginNamespace) {}

IPluginV2DynamicExt* PluginV2::clone() const noexcept {
    return guarded<IPluginV2DynamicExt*>(getPluginType(), "clone", nullptr, [&] {
        auto copy = std::make_unique<PluginV2>(operator_->clone());
        copy->namespace_ = namespace_;
        return copy.release();
    });
}

DimsExprs PluginV2::getOutputDimensions(int32_t /*outputIndex*/, const DimsExprs* inputs, int32_t nbInputs,
                                        IExprBuilder& exprBuilder) noexcept {
    // Zero dimensions are how this interface says that it failed.
    return guarded(getPluginType(), "getOutputDimensions", DimsExprs{}, [&] {
        DimsExprs output{};
        const std::string error = operator_->output_shape(inputs, nbInputs, exprBuilder, output);
        if (!error.empty()) log_error(error);
        return output;
    });
}

bool PluginV2::supportsFormatCombination(int32_t pos, const PluginTensorDesc* inOut, int32_t nbInputs,
                                         int32_t nbOutputs) noexcept {
    return operator_->supports(pos, inOut, nbInputs, nbOutputs);
}

void PluginV2::configurePlugin(const DynamicPluginTensorDesc* in, int32_t nbInputs, const DynamicPluginTensorDesc* out,
                               int32_t nbOutputs) noexcept {
    // The interface cannot refuse here; enqueue checks again and does.
    guarded(getPluginType(), "configurePlugin", 0, [&] {
        std::vector<PluginTensorDesc> inputs;
        std::vector<PluginTensorDesc> outputs;
        for (int32_t i = 0; i < nbInputs; ++i) inputs.push_back(in[i].desc);
        for (int32_t i = 0; i < nbOutputs; ++i) outputs.push_back(out[i].desc);
        const std::string error = operator_->shape_error({inputs.data(), outputs.data()}, nbInputs, nbOutputs);
        if (!error.empty()) log_error(error);
        return 0;
    });
}

size_t PluginV2::getWorkspaceSize(const PluginTensorDesc* /*inputs*/, int32_t /*nbInputs*/,
                                  const PluginTensorDesc* /*outputs*/, int32_t /*nbOutputs*/) const noexcept {
    return 0;
}

int32_t PluginV2::enqueue(const PluginTensorDesc* inputDesc, const PluginTensorDesc* outputDesc,
                          const void* const* inputs, void* const* outputs, void* /*workspace*/,
                          cudaStream_t stream) noexcept {
    // This interface has no tactics: 0 lets the launch choose by size.
    return guarded<int32_t>(getPluginType(), "enqueue", -1,
                            [&] { return operator_->enqueue({inputDesc, outputDesc}, inputs, outputs, 0, stream); });
}

DataType PluginV2::getOutputDataType(int32_t /*index*/, const DataType* inputTypes,
                                     int32_t /*nbInputs*/) const noexcept {
    return operator_->output_type(inputTypes[0]);
}

const char* PluginV2::getPluginType() const noexcept { return operator_->type().name; }

const char* PluginV2::getPluginVersion() const noexcept { return kPluginVersion; }

int32_t PluginV2::getNbOutputs() const noexcept { return 1; }

int32_t PluginV2::initialize() noexcept { return 0; }

void PluginV2::terminate() noexcept {}

size_t PluginV2::getSerializationSize() const noexcept { return bytes_.size(); }

void PluginV2::serialize(void* buffer) const noexcept { memcpy(buffer, bytes_.data(), bytes_.size()); }

void PluginV2::destroy() noexcept { delete this; }

void PluginV2::setPluginNamespace(const char* pluginNamespace) noexcept {
    guarded(getPluginType(), "setPluginNamespace", 0, [&] {
        namespace_ = pluginNamespace != nullptr ? pluginNamespace : "";
        return 0;
    });
}

const char* PluginV2::getPluginNamespace() const noexcept { return namespace_.c_str(); }

const char* CreatorV2::getPluginName() const noexcept { return type_.name; }

const char* CreatorV2::getPluginVersion() const noexcept { return kPluginVersion; }

const PluginFieldCollection* CreatorV2::getFieldNames() noexcept {
    return guarded<const PluginFieldCollection*>(type_.name, "getFieldNames", nullptr, type_.field_names);
}

IPluginV2* CreatorV2::wrap(std::unique_ptr<Operator> op) const {
    if (op == nullptr) return nullptr;
    auto plugin = std::make_unique<PluginV2>(std::move(op));
    plugin->setPluginNamespace(namespace_.c_str());
    return plugin.release();
}

IPluginV2* CreatorV2::createPlugin(const char* name, const PluginFieldCollection* fc) noexcept {
    return guarded<IPluginV2*>(type_.name, "createPlugin", nullptr,
                               [&] { return wrap(type_.create(type_, name, fc)); });
}

IPluginV2* CreatorV2::deserializePlugin(const char* name, const void* serialData, size_t serialLength) noexcept {
    return guarded<IPluginV2*>(type_.name, "deserializePlugin", nullptr,
                               [&] { return wrap(type_.deserialize(type_, name, serialData, serialLength)); });
}

void CreatorV2::setPluginNamespace(const char* pluginNamespace) noexcept {
    guarded(type_.name, "setPluginNamespace", 0, [&] {
        namespace_ = pluginNamespace != nullptr ? pluginNamespace : "";
        return 0;
    });
}

const char* CreatorV2::getPluginNamespace() const noexcept { return namespace_.c_str(); }

}  // namespace internimage
#endif  // PLUGIN_INTERFACE == 2
