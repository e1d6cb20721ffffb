// SPDX-License-Identifier: Apache-2.0
#include "dcnv3_operator.h"

#include <algorithm>
#include <cstring>

#include "kernel/dcnv3_launch.h"
#include "plugin_log.h"
#include "plugin_registration.h"

namespace internimage {
namespace {

using nvinfer1::DataType;
using nvinfer1::DimensionOperation;
using nvinfer1::Dims;
using nvinfer1::DimsExprs;
using nvinfer1::IDimensionExpr;
using nvinfer1::IExprBuilder;
using nvinfer1::PluginTensorDesc;

bool is_known(DataType type) {
#if DCNV3_TENSORRT_AT_LEAST(9, 0)
    if (type == DataType::kBF16) return true;
#endif
    return type == DataType::kFLOAT || type == DataType::kHALF;
}

DType dtype_of(DataType type) {
    if (type == DataType::kFLOAT) return DType::kFloat32;
    return type == DataType::kHALF ? DType::kFloat16 : DType::kBFloat16;
}

std::string text(const Dims& dims) {
    std::string result = "(";
    for (int32_t i = 0; i < dims.nbDims && i < Dims::MAX_DIMS; ++i) {
        result += (i > 0 ? ", " : "") + std::to_string(dims.d[i]);
    }
    return result + ")";
}

std::string texts(const PluginTensorDesc* inputs, const PluginTensorDesc* outputs) {
    return "input " + text(inputs[kInputIdx].dims) + ", offset " + text(inputs[kOffsetIdx].dims) + ", mask " +
           text(inputs[kMaskIdx].dims) + ", output " + text(outputs[0].dims);
}

constexpr int64_t kUnknown = -1;

// Compares one tensor's dimensions with the expected ones, where both are known.
std::string mismatch(const char* name, const Dims& dims, const int64_t (&expected)[4]) {
    if (dims.nbDims != 4) return std::string(name) + " must have 4 dimensions";
    for (int32_t i = 0; i < 4; ++i) {
        if (dims.d[i] < 0 || expected[i] == kUnknown || dims.d[i] == expected[i]) continue;
        return std::string(name) + " has " + std::to_string(dims.d[i]) + " in dimension " + std::to_string(i) +
               ": expected " + std::to_string(expected[i]);
    }
    return {};
}

const IDimensionExpr* output_expr(const IDimensionExpr& side, int64_t kernel, int64_t stride, int64_t pad,
                                  int64_t dilation, IExprBuilder& builder) {
    // floor((side + 2 * pad - extent) / stride) + 1, with one constant for what is known.
    const int64_t extent = dilation * (kernel - 1) + 1;
    const auto* room = builder.operation(DimensionOperation::kSUM, side, *builder.constant(2 * pad - extent));
    const auto* strides = builder.operation(DimensionOperation::kFLOOR_DIV, *room, *builder.constant(stride));
    return builder.operation(DimensionOperation::kSUM, *strides, *builder.constant(1));
}

}  // namespace

Dcnv3Operator::Dcnv3Operator(const Attributes& attributes, std::string layer)
    : attributes_(attributes), layer_(std::move(layer)) {}

DimsExprs Dcnv3Operator::output_shape(const DimsExprs& input, IExprBuilder& builder) const {
    const Attributes& a = attributes_;
    DimsExprs output{};
    output.nbDims = 4;
    output.d[0] = input.d[0];
    output.d[1] = output_expr(*input.d[1], a.kernel_h, a.stride_h, a.pad_h, a.dilation_h, builder);
    output.d[2] = output_expr(*input.d[2], a.kernel_w, a.stride_w, a.pad_w, a.dilation_w, builder);
    output.d[3] = input.d[3];
    return output;
}

bool Dcnv3Operator::supports(int32_t position, const PluginTensorDesc* tensors, int32_t inputs, int32_t outputs) {
    if (inputs != kInputs || outputs != kOutputs || position < 0 || position >= kInputs + kOutputs) return false;
    const PluginTensorDesc& tensor = tensors[position];
    return tensor.format == nvinfer1::TensorFormat::kLINEAR && is_known(tensor.type) &&
           tensor.type == tensors[kInputIdx].type;
}

std::string Dcnv3Operator::shape_error(const PluginTensorDesc* inputs, int32_t input_count,
                                       const PluginTensorDesc* outputs, int32_t output_count) const {
    if (input_count != kInputs || output_count != kOutputs) {
        return named("it has " + std::to_string(input_count) + " inputs and " + std::to_string(output_count) +
                     " outputs: expected 3 (input, offset, mask) and 1");
    }
    const Attributes& a = attributes_;
    const int64_t channels = int64_t{a.group} * a.group_channels;
    const int64_t points = int64_t{a.group} * a.kernel_h * a.kernel_w;
    const Dims& input = inputs[kInputIdx].dims;
    std::string error = mismatch("input", input, {kUnknown, kUnknown, kUnknown, channels});
    if (error.empty()) {
        int64_t sides[2] = {kUnknown, kUnknown};
        const int64_t kernel[2] = {a.kernel_h, a.kernel_w};
        const int64_t stride[2] = {a.stride_h, a.stride_w};
        const int64_t pad[2] = {a.pad_h, a.pad_w};
        const int64_t dilation[2] = {a.dilation_h, a.dilation_w};
        for (int32_t i = 0; i < 2 && error.empty(); ++i) {
            const int64_t side = input.d[1 + i];
            if (side < 0) continue;
            const int64_t padded = side + 2 * pad[i];
            const char* name = i == 0 ? "height" : "width";
            if (padded > kMaxSide) {
                error = std::string(name) + " with padding is above " + std::to_string(kMaxSide);
            } else if (padded < dilation[i] * (kernel[i] - 1) + 1) {
                error = std::string("the dilated kernel exceeds the padded ") + name;
            } else {
                sides[i] = output_side(side, kernel[i], stride[i], pad[i], dilation[i]);
            }
        }
        const int64_t batch = input.d[0] < 0 ? kUnknown : input.d[0];
        const auto check = [&](const char* name, const Dims& dims, int64_t depth) {
            if (error.empty()) error = mismatch(name, dims, {batch, sides[0], sides[1], depth});
        };
        check("offset", inputs[kOffsetIdx].dims, points * 2);
        check("mask", inputs[kMaskIdx].dims, points);
        check("output", outputs[0].dims, channels);
    }
    return error.empty() ? error : named(error + " [" + texts(inputs, outputs) + "]");
}

Dcnv3Params Dcnv3Operator::make_params(const Dims& input) const {
    const Attributes& a = attributes_;
    Dcnv3Params p{};
    p.batch = static_cast<int32_t>(input.d[0]);
    p.height = static_cast<int32_t>(input.d[1]);
    p.width = static_cast<int32_t>(input.d[2]);
    p.out_height = static_cast<int32_t>(output_side(p.height, a.kernel_h, a.stride_h, a.pad_h, a.dilation_h));
    p.out_width = static_cast<int32_t>(output_side(p.width, a.kernel_w, a.stride_w, a.pad_w, a.dilation_w));
    p.groups = a.group;
    p.group_channels = a.group_channels;
    p.kernel_h = a.kernel_h;
    p.kernel_w = a.kernel_w;
    p.stride_h = a.stride_h;
    p.stride_w = a.stride_w;
    p.pad_h = a.pad_h;
    p.pad_w = a.pad_w;
    p.dilation_h = a.dilation_h;
    p.dilation_w = a.dilation_w;
    p.offset_scale = a.offset_scale;
    p.mask_softmax = a.mask_softmax;
    set_dense_strides(p);
    return p;
}

std::vector<int32_t> Dcnv3Operator::tactics(const PluginTensorDesc* inputs) const {
    const Dims& dims = inputs[kInputIdx].dims;
    const bool known = std::all_of(dims.d, dims.d + 4, [](int64_t d) { return d > 0; });
    const Dcnv3Params p = make_params(dims);
    const DType dtype = dtype_of(inputs[kInputIdx].type);
    std::vector<int32_t> result;
    for (int32_t i = 0; i < kTactics; ++i) {
        if (!known || parameter_error(p, dtype) != nullptr || config_is_distinct(p, dtype, i)) result.push_back(i + 1);
    }
    return result;
}

int32_t Dcnv3Operator::enqueue(const PluginTensorDesc* input_descs, const PluginTensorDesc* output_descs,
                               const void* const* inputs, void* const* outputs, int32_t tactic,
                               cudaStream_t stream) const {
    const std::string error = shape_error(input_descs, kInputs, output_descs, kOutputs);
    if (!error.empty()) {
        log_error(error);
        return cudaErrorInvalidValue;
    }
    const Dims& dims = input_descs[kInputIdx].dims;
    if (dims.d[0] == 0) return cudaSuccess;
    Dcnv3Params p = make_params(dims);
    p.input = inputs[kInputIdx];
    p.offset = inputs[kOffsetIdx];
    p.mask = inputs[kMaskIdx];
    p.output = outputs[0];
    const DType dtype = dtype_of(input_descs[kInputIdx].type);
    const char* refused = parameter_error(p, dtype);
    const cudaError_t status = refused ? cudaErrorInvalidValue : launch_dcnv3(p, dtype, tactic, stream);
    if (status != cudaSuccess) {
        log_error(named(std::string(refused ? refused : cudaGetErrorString(status)) + " with tactic " +
                        std::to_string(tactic) + " [" + texts(input_descs, output_descs) + "]"));
    }
    return status;
}

std::string Dcnv3Operator::timing_id() const {
    std::string id = "internimage-dcnv3-" + std::to_string(kTacticsRevision);
    for (const IntegerAttribute& attribute : kIntegerAttributes) {
        id += "_" + std::to_string(attributes_.*attribute.member);
    }
    // Its bits: in decimals close values would share timings.
    uint32_t scale = 0;
    memcpy(&scale, &attributes_.offset_scale, sizeof(scale));
    return id + "_" + std::to_string(scale);
}

bool create_operator(const char* layer, const nvinfer1::PluginFieldCollection* fields, Attributes& attributes) {
    const std::string error = read_attributes(fields, attributes);
    if (!error.empty()) log_error("DCNv3 '" + std::string(layer != nullptr ? layer : "") + "': " + error);
    return error.empty();
}

}  // namespace internimage
