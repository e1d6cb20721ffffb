// SPDX-License-Identifier: Apache-2.0
#include "operator.h"

#include <algorithm>

#include "kernel/grid.h"
#include "plugin_log.h"
#include "plugin_registration.h"

namespace internimage {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DimsExprs;
using nvinfer1::PluginTensorDesc;

namespace {

constexpr const char* kOutput = "output";

std::string text(const Dims& dims) {
    std::string result = "(";
    for (int32_t i = 0; i < dims.nbDims && i < Dims::MAX_DIMS; ++i) {
        result += (i > 0 ? ", " : "") + std::to_string(dims.d[i]);
    }
    return result + ")";
}

std::string rank_error(const char* name, int32_t rank, int32_t expected) {
    if (rank == expected) return {};
    return std::string(name) + " must have " + std::to_string(expected) + " dimensions, and has " +
           std::to_string(rank);
}

bool all_positive(const Dims& dims) {
    return std::all_of(dims.d, dims.d + dims.nbDims, [](int64_t d) { return d > 0; });
}

}  // namespace

std::string Operator::count_error(int32_t inputs, int32_t outputs) const {
    if (inputs == type_.input_count && outputs == 1) return {};
    std::string names;
    for (int32_t i = 0; i < type_.input_count; ++i) names += (i > 0 ? ", " : "") + std::string(type_.inputs[i].name);
    return "got " + std::to_string(inputs) + " inputs and " + std::to_string(outputs) + " outputs: expected " +
           std::to_string(type_.input_count) + " inputs (" + names + ") and 1 output";
}

std::string Operator::shapes(const Call& call) const {
    std::string result;
    for (int32_t i = 0; i < type_.input_count; ++i) {
        result += std::string(type_.inputs[i].name) + " " + text(call.inputs[i].dims) + ", ";
    }
    return result + kOutput + " " + text(call.outputs[0].dims);
}

std::string Operator::output_shape(const DimsExprs* inputs, int32_t input_count, nvinfer1::IExprBuilder& builder,
                                   DimsExprs& output) const {
    std::string error = count_error(input_count, 1);
    for (int32_t i = 0; i < input_count && error.empty(); ++i) {
        error = rank_error(type_.inputs[i].name, inputs[i].nbDims, type_.inputs[i].rank);
    }
    if (!error.empty()) return named(error);
    output = output_dims(inputs, builder);
    return {};
}

bool Operator::supports(int32_t position, const PluginTensorDesc* tensors, int32_t inputs, int32_t outputs) const {
    if (inputs != type_.input_count || outputs != 1 || position < 0 || position > inputs) return false;
    return tensors[position].format == nvinfer1::TensorFormat::kLINEAR &&
           takes(position, tensors[position].type, tensors[0].type);
}

std::string Operator::shape_error(const Call& call, int32_t input_count, int32_t output_count) const {
    std::string error = count_error(input_count, output_count);
    if (!error.empty()) return named(error);
    for (int32_t i = 0; i < input_count && error.empty(); ++i) {
        error = rank_error(type_.inputs[i].name, call.inputs[i].dims.nbDims, type_.inputs[i].rank);
    }
    if (error.empty()) error = rank_error(kOutput, call.outputs[0].dims.nbDims, type_.output_rank);
    if (error.empty()) error = mismatch(call);
    return error.empty() ? error : named(error + " [" + shapes(call) + "]");
}

std::vector<int32_t> Operator::tactics(const Call& call) const {
    bool known = all_positive(call.outputs[0].dims);
    for (int32_t i = 0; i < type_.input_count; ++i) known = known && all_positive(call.inputs[i].dims);
    std::vector<int32_t> result;
    for (int32_t i = 0; i < kTactics; ++i) {
        if (!known || is_distinct(call, i)) result.push_back(i + 1);
    }
    return result;
}

int32_t Operator::enqueue(const Call& call, const void* const* inputs, void* const* outputs, int32_t tactic,
                          cudaStream_t stream) const {
    const std::string error = shape_error(call, type_.input_count, 1);
    if (!error.empty()) {
        log_error(error);
        return cudaErrorInvalidValue;
    }
    const Dims& output = call.outputs[0].dims;
    if (std::find(output.d, output.d + output.nbDims, 0) != output.d + output.nbDims) return cudaSuccess;
    const char* refused = nullptr;
    const cudaError_t status = launch(call, inputs, outputs[0], tactic, stream, refused);
    if (status != cudaSuccess) {
        log_error(named(std::string(refused ? refused : cudaGetErrorString(status)) + " with tactic " +
                        std::to_string(tactic) + " [" + shapes(call) + "]"));
    }
    return status;
}

std::string Operator::named(const std::string& message) const {
    return internimage::named(type_, layer_.c_str(), message);
}

bool is_floating(DataType type) {
#if PLUGIN_TENSORRT_AT_LEAST(9, 0)
    if (type == DataType::kBF16) return true;
#endif
    return type == DataType::kFLOAT || type == DataType::kHALF;
}

DType dtype_of(DataType type) {
    if (type == DataType::kFLOAT) return DType::kFloat32;
    return type == DataType::kHALF ? DType::kFloat16 : DType::kBFloat16;
}

std::string compare(const char* name, const Dims& dims, std::initializer_list<int64_t> expected) {
    int32_t i = 0;
    for (const int64_t value : expected) {
        const int64_t got = dims.d[i];
        if (got >= 0 && value >= 0 && got != value) {
            return std::string(name) + " has " + std::to_string(got) + " in dimension " + std::to_string(i) +
                   ": expected " + std::to_string(value);
        }
        ++i;
    }
    return {};
}

std::string named(const OperatorType& type, const char* layer, const std::string& message) {
    return std::string(type.name) + " '" + (layer != nullptr ? layer : "") + "': " + message;
}

bool is_plugin_field(const std::string& name) { return name == "plugin_version" || name == "plugin_namespace"; }

std::unique_ptr<Operator> refuse_bytes(const OperatorType& type, const char* layer, size_t size) {
    log_error(
        named(type, layer, std::to_string(size) + " bytes in the engine are not this plugin's: rebuild the engine"));
    return nullptr;
}

}  // namespace internimage
