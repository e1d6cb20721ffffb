// SPDX-License-Identifier: Apache-2.0
// IPluginV3 is unknown to the headers of TensorRT 8 and 9: there, and for interface 2, this file is empty.
#include "plugin_registration.h"

#if PLUGIN_INTERFACE == 3
#include <algorithm>

#include "kernel/grid.h"
#include "plugin_log.h"
#include "plugin_v3.h"

namespace internimage {

using namespace nvinfer1;

namespace {

constexpr int32_t kFailed = -1;

int32_t report(const std::string& error) {
    if (error.empty()) return 0;
    log_error(error);
    return kFailed;
}

}  // namespace

PluginV3::PluginV3(std::unique_ptr<Operator> op) : operator_(std::move(op)), timing_id_(operator_->timing_id()) {
    for (int32_t i = 1; i <= kTactics; ++i) tactics_.push_back(i);
}

IPluginCapability* PluginV3::getCapabilityInterface(PluginCapabilityType type) noexcept {
    switch (type) {
        case PluginCapabilityType::kCORE:
            return static_cast<IPluginV3OneCore*>(this);
        case PluginCapabilityType::kBUILD:
            return static_cast<IPluginV3OneBuild*>(this);
        case PluginCapabilityType::kRUNTIME:
            return static_cast<IPluginV3OneRuntime*>(this);
    }
    return nullptr;
}

IPluginV3* PluginV3::clone() noexcept {
    return guarded<IPluginV3*>(getPluginName(), "clone", nullptr, [&] {
        auto copy = std::make_unique<PluginV3>(operator_->clone());
        copy->tactic_ = tactic_;
        copy->tactics_ = tactics_;
        return copy.release();
    });
}

const char* PluginV3::getPluginName() const noexcept { return operator_->type().name; }

const char* PluginV3::getPluginVersion() const noexcept { return kPluginVersion; }

const char* PluginV3::getPluginNamespace() const noexcept { return kPluginNamespace; }

int32_t PluginV3::getNbOutputs() const noexcept { return 1; }

int32_t PluginV3::configurePlugin(const DynamicPluginTensorDesc* in, int32_t nbInputs,
                                  const DynamicPluginTensorDesc* out, int32_t nbOutputs) noexcept {
    return guarded<int32_t>(getPluginName(), "configurePlugin", kFailed, [&] {
        std::vector<PluginTensorDesc> inputs;
        std::vector<PluginTensorDesc> outputs;
        for (int32_t i = 0; i < nbInputs; ++i) inputs.push_back(in[i].desc);
        for (int32_t i = 0; i < nbOutputs; ++i) outputs.push_back(out[i].desc);
        const Call call{inputs.data(), outputs.data()};
        const std::string error = operator_->shape_error(call, nbInputs, nbOutputs);
        if (error.empty()) tactics_ = operator_->tactics(call);
        return report(error);
    });
}

bool PluginV3::supportsFormatCombination(int32_t pos, const DynamicPluginTensorDesc* inOut, int32_t nbInputs,
                                         int32_t nbOutputs) noexcept {
    return guarded(getPluginName(), "supportsFormatCombination", false, [&] {
        std::vector<PluginTensorDesc> tensors;
        for (int32_t i = 0; i <= pos; ++i) tensors.push_back(inOut[i].desc);
        return operator_->supports(pos, tensors.data(), nbInputs, nbOutputs);
    });
}

int32_t PluginV3::getOutputDataTypes(DataType* outputTypes, int32_t nbOutputs, const DataType* inputTypes,
                                     int32_t nbInputs) const noexcept {
    if (nbInputs != operator_->type().input_count || nbOutputs != 1) return kFailed;
    outputTypes[0] = operator_->output_type(inputTypes[0]);
    return 0;
}

int32_t PluginV3::getOutputShapes(const DimsExprs* inputs, int32_t nbInputs, const DimsExprs* /*shapeInputs*/,
                                  int32_t /*nbShapeInputs*/, DimsExprs* outputs, int32_t nbOutputs,
                                  IExprBuilder& exprBuilder) noexcept {
    return guarded<int32_t>(getPluginName(), "getOutputShapes", kFailed, [&] {
        return nbOutputs == 1 ? report(operator_->output_shape(inputs, nbInputs, exprBuilder, outputs[0])) : kFailed;
    });
}

int32_t PluginV3::getNbTactics() noexcept { return static_cast<int32_t>(tactics_.size()); }

int32_t PluginV3::getValidTactics(int32_t* tactics, int32_t nbTactics) noexcept {
    if (nbTactics != getNbTactics()) return kFailed;
    std::copy(tactics_.begin(), tactics_.end(), tactics);
    return 0;
}

const char* PluginV3::getTimingCacheID() noexcept { return timing_id_.c_str(); }

int32_t PluginV3::setTactic(int32_t tactic) noexcept {
    if (tactic < 0 || tactic > kTactics) {
        return guarded<int32_t>(getPluginName(), "setTactic", kFailed, [&] {
            return report(operator_->named("tactic " + std::to_string(tactic) + " does not exist: expected 0 to " +
                                           std::to_string(kTactics) +
                                           "; the engine may come from another version of this plugin"));
        });
    }
    tactic_ = tactic;
    return 0;
}

int32_t PluginV3::onShapeChange(const PluginTensorDesc* in, int32_t nbInputs, const PluginTensorDesc* out,
                                int32_t nbOutputs) noexcept {
    return guarded<int32_t>(getPluginName(), "onShapeChange", kFailed,
                            [&] { return report(operator_->shape_error({in, out}, nbInputs, nbOutputs)); });
}

int32_t PluginV3::enqueue(const PluginTensorDesc* inputDesc, const PluginTensorDesc* outputDesc,
                          const void* const* inputs, void* const* outputs, void* /*workspace*/,
                          cudaStream_t stream) noexcept {
    return guarded<int32_t>(getPluginName(), "enqueue", kFailed, [&] {
        return operator_->enqueue({inputDesc, outputDesc}, inputs, outputs, tactic_, stream);
    });
}

IPluginV3* PluginV3::attachToContext(IPluginResourceContext* /*context*/) noexcept { return clone(); }

const PluginFieldCollection* PluginV3::getFieldsToSerialize() noexcept {
    return guarded<const PluginFieldCollection*>(getPluginName(), "getFieldsToSerialize", nullptr, [&] {
        fields_ = operator_->fields();
        collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
        return &collection_;
    });
}

IPluginV3* CreatorV3::createPlugin(const char* name, const PluginFieldCollection* fc,
                                   TensorRTPhase /*phase*/) noexcept {
    return guarded<IPluginV3*>(type_.name, "createPlugin", nullptr, [&]() -> IPluginV3* {
        std::unique_ptr<Operator> op = type_.create(type_, name, fc);
        return op != nullptr ? new PluginV3(std::move(op)) : nullptr;
    });
}

const PluginFieldCollection* CreatorV3::getFieldNames() noexcept {
    return guarded<const PluginFieldCollection*>(type_.name, "getFieldNames", nullptr, type_.field_names);
}

const char* CreatorV3::getPluginName() const noexcept { return type_.name; }

const char* CreatorV3::getPluginVersion() const noexcept { return kPluginVersion; }

const char* CreatorV3::getPluginNamespace() const noexcept { return kPluginNamespace; }

}  // namespace internimage
#endif  // PLUGIN_INTERFACE == 3
