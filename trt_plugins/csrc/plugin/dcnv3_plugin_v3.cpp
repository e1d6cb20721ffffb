// SPDX-License-Identifier: Apache-2.0
#include "dcnv3_plugin_v3.h"

#include <algorithm>

#include "kernel/dcnv3_variants.h"
#include "plugin_log.h"
#include "plugin_registration.h"

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

Dcnv3PluginV3::Dcnv3PluginV3(const Attributes& attributes, std::string layer, const char* name)
    : operator_(attributes, std::move(layer)), name_(name), timing_id_(operator_.timing_id()) {
    for (int32_t i = 1; i <= kTactics; ++i) tactics_.push_back(i);
}

IPluginCapability* Dcnv3PluginV3::getCapabilityInterface(PluginCapabilityType type) noexcept {
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

IPluginV3* Dcnv3PluginV3::clone() noexcept {
    return guarded<IPluginV3*>("DCNv3 clone", nullptr, [&] {
        auto copy = std::make_unique<Dcnv3PluginV3>(operator_.attributes(), operator_.layer(), name_);
        copy->tactic_ = tactic_;
        copy->tactics_ = tactics_;
        return copy.release();
    });
}

const char* Dcnv3PluginV3::getPluginName() const noexcept { return name_; }

const char* Dcnv3PluginV3::getPluginVersion() const noexcept { return kPluginVersion; }

const char* Dcnv3PluginV3::getPluginNamespace() const noexcept { return kPluginNamespace; }

int32_t Dcnv3PluginV3::getNbOutputs() const noexcept { return kOutputs; }

int32_t Dcnv3PluginV3::configurePlugin(const DynamicPluginTensorDesc* in, int32_t nbInputs,
                                       const DynamicPluginTensorDesc* out, int32_t nbOutputs) noexcept {
    return guarded<int32_t>("DCNv3 configurePlugin", kFailed, [&] {
        std::vector<PluginTensorDesc> inputs;
        std::vector<PluginTensorDesc> outputs;
        for (int32_t i = 0; i < nbInputs; ++i) inputs.push_back(in[i].desc);
        for (int32_t i = 0; i < nbOutputs; ++i) outputs.push_back(out[i].desc);
        const std::string error = operator_.shape_error(inputs.data(), nbInputs, outputs.data(), nbOutputs);
        if (error.empty()) tactics_ = operator_.tactics(inputs.data());
        return report(error);
    });
}

bool Dcnv3PluginV3::supportsFormatCombination(int32_t pos, const DynamicPluginTensorDesc* inOut, int32_t nbInputs,
                                              int32_t nbOutputs) noexcept {
    return guarded("DCNv3 supportsFormatCombination", false, [&] {
        std::vector<PluginTensorDesc> tensors;
        for (int32_t i = 0; i <= pos; ++i) tensors.push_back(inOut[i].desc);
        return Dcnv3Operator::supports(pos, tensors.data(), nbInputs, nbOutputs);
    });
}

int32_t Dcnv3PluginV3::getOutputDataTypes(DataType* outputTypes, int32_t nbOutputs, const DataType* inputTypes,
                                          int32_t nbInputs) const noexcept {
    if (nbInputs != kInputs || nbOutputs != kOutputs) return kFailed;
    outputTypes[0] = inputTypes[kInputIdx];
    return 0;
}

int32_t Dcnv3PluginV3::getOutputShapes(const DimsExprs* inputs, int32_t nbInputs, const DimsExprs* /*shapeInputs*/,
                                       int32_t /*nbShapeInputs*/, DimsExprs* outputs, int32_t nbOutputs,
                                       IExprBuilder& exprBuilder) noexcept {
    return guarded<int32_t>("DCNv3 getOutputShapes", kFailed, [&] {
        if (nbInputs != kInputs || nbOutputs != kOutputs || inputs[kInputIdx].nbDims != 4) {
            return report(
                operator_.named("expected 3 inputs (input, offset, mask), the first of 4 dimensions, and 1 "
                                "output"));
        }
        outputs[0] = operator_.output_shape(inputs[kInputIdx], exprBuilder);
        return 0;
    });
}

int32_t Dcnv3PluginV3::getNbTactics() noexcept { return static_cast<int32_t>(tactics_.size()); }

int32_t Dcnv3PluginV3::getValidTactics(int32_t* tactics, int32_t nbTactics) noexcept {
    if (nbTactics != getNbTactics()) return kFailed;
    std::copy(tactics_.begin(), tactics_.end(), tactics);
    return 0;
}

const char* Dcnv3PluginV3::getTimingCacheID() noexcept { return timing_id_.c_str(); }

int32_t Dcnv3PluginV3::setTactic(int32_t tactic) noexcept {
    if (tactic < 0 || tactic > kTactics) {
        return guarded<int32_t>("DCNv3 setTactic", kFailed, [&] {
            return report(operator_.named("tactic " + std::to_string(tactic) + " does not exist: expected 0 to " +
                                          std::to_string(kTactics) +
                                          "; the engine may come from another version of this plugin"));
        });
    }
    tactic_ = tactic;
    return 0;
}

int32_t Dcnv3PluginV3::onShapeChange(const PluginTensorDesc* in, int32_t nbInputs, const PluginTensorDesc* out,
                                     int32_t nbOutputs) noexcept {
    return guarded<int32_t>("DCNv3 onShapeChange", kFailed,
                            [&] { return report(operator_.shape_error(in, nbInputs, out, nbOutputs)); });
}

int32_t Dcnv3PluginV3::enqueue(const PluginTensorDesc* inputDesc, const PluginTensorDesc* outputDesc,
                               const void* const* inputs, void* const* outputs, void* /*workspace*/,
                               cudaStream_t stream) noexcept {
    return guarded<int32_t>("DCNv3 enqueue", kFailed,
                            [&] { return operator_.enqueue(inputDesc, outputDesc, inputs, outputs, tactic_, stream); });
}

IPluginV3* Dcnv3PluginV3::attachToContext(IPluginResourceContext* /*context*/) noexcept { return clone(); }

const PluginFieldCollection* Dcnv3PluginV3::getFieldsToSerialize() noexcept {
    return guarded<const PluginFieldCollection*>("DCNv3 getFieldsToSerialize", nullptr, [&] {
        fields_ = attribute_fields(operator_.attributes());
        collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
        return &collection_;
    });
}

IPluginV3* Dcnv3CreatorV3::createPlugin(const char* name, const PluginFieldCollection* fc,
                                        TensorRTPhase /*phase*/) noexcept {
    return guarded<IPluginV3*>("DCNv3 createPlugin", nullptr, [&]() -> IPluginV3* {
        Attributes attributes{};
        if (!create_operator(name, fc, attributes)) return nullptr;
        return new Dcnv3PluginV3(attributes, name != nullptr ? name : "", getPluginName());
    });
}

const PluginFieldCollection* Dcnv3CreatorV3::getFieldNames() noexcept {
    return guarded<const PluginFieldCollection*>("DCNv3 getFieldNames", nullptr,
                                                 [&] { return attribute_names(official_); });
}

const char* Dcnv3CreatorV3::getPluginName() const noexcept { return official_ ? kOfficialPluginName : kPluginName; }

const char* Dcnv3CreatorV3::getPluginVersion() const noexcept { return kPluginVersion; }

const char* Dcnv3CreatorV3::getPluginNamespace() const noexcept { return kPluginNamespace; }

}  // namespace internimage
