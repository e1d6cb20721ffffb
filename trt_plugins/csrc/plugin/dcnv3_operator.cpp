// SPDX-License-Identifier: Apache-2.0
#include "dcnv3_operator.h"

#include <cstdlib>
#include <cstring>

#include "dcnv3_attributes.h"
#include "kernel/bilinear.h"
#include "kernel/dcnv3_launch.h"
#include "plugin_log.h"

namespace internimage {
namespace {

using nvinfer1::DataType;
using nvinfer1::DimensionOperation;
using nvinfer1::Dims;
using nvinfer1::DimsExprs;
using nvinfer1::IDimensionExpr;
using nvinfer1::IExprBuilder;
using nvinfer1::PluginFieldCollection;

enum Input : int32_t { kInputIdx, kOffsetIdx, kMaskIdx };
constexpr TensorInfo kInputs[] = {{"input", 4}, {"offset", 4}, {"mask", 4}};
// The packed operator: channels [0, G*K*2) of the second input are the offsets, [G*K*2, G*K*3) the mask.
constexpr TensorInfo kPackedInputs[] = {{"input", 4}, {"offset_mask", 4}};

// What an engine of IPluginV2 holds. The tag tells a foreign or truncated blob from ours.
struct Blob {
    uint32_t tag;
    Attributes attributes;
};
constexpr uint32_t kTag = 0x34564344;  // "DCV4", second layout

const IDimensionExpr* output_expr(const IDimensionExpr& side, int64_t kernel, int64_t stride, int64_t pad,
                                  int64_t dilation, IExprBuilder& builder) {
    // floor((side + 2 * pad - extent) / stride) + 1, with one constant for what is known. TensorRT promises nothing
    // about negative constants, so the sign is in the operation.
    const int64_t shrink = dilation * (kernel - 1) + 1 - 2 * pad;
    const auto sign = shrink > 0 ? DimensionOperation::kSUB : DimensionOperation::kSUM;
    const auto* room = builder.operation(sign, side, *builder.constant(std::abs(shrink)));
    const auto* strides = builder.operation(DimensionOperation::kFLOOR_DIV, *room, *builder.constant(stride));
    return builder.operation(DimensionOperation::kSUM, *strides, *builder.constant(1));
}

class Dcnv3Operator final : public Operator {
  public:
    Dcnv3Operator(const OperatorType& type, std::string layer, const Attributes& attributes)
        : Operator(type, std::move(layer)), attributes_(attributes) {}

    std::unique_ptr<Operator> clone() const override {
        return std::make_unique<Dcnv3Operator>(type(), layer(), attributes_);
    }

    std::vector<nvinfer1::PluginField> fields() const override { return attribute_fields(attributes_); }

    std::string serialize() const override {
        const Blob blob{kTag, attributes_};
        return std::string(reinterpret_cast<const char*>(&blob), sizeof(blob));
    }

    std::string timing_id() const override {
        std::string id =
            "internimage-dcnv3-" + std::string(packed() ? "packed-" : "") + std::to_string(kTacticsRevision);
        for (const IntegerAttribute& attribute : kIntegerAttributes) {
            id += "_" + std::to_string(attributes_.*attribute.member);
        }
        // Its bits: in decimals close values would share timings.
        uint32_t scale = 0;
        memcpy(&scale, &attributes_.offset_scale, sizeof(scale));
        return id + "_" + std::to_string(scale);
    }

  protected:
    DimsExprs output_dims(const DimsExprs* inputs, IExprBuilder& builder) const override {
        const Attributes& a = attributes_;
        const DimsExprs& input = inputs[kInputIdx];
        DimsExprs output{};
        output.nbDims = 4;
        output.d[0] = input.d[0];
        output.d[1] = output_expr(*input.d[1], a.kernel_h, a.stride_h, a.pad_h, a.dilation_h, builder);
        output.d[2] = output_expr(*input.d[2], a.kernel_w, a.stride_w, a.pad_w, a.dilation_w, builder);
        output.d[3] = input.d[3];
        return output;
    }

    bool takes(int32_t /*position*/, DataType type, DataType first) const override {
        return is_floating(type) && type == first;
    }

    std::string mismatch(const Call& call) const override;

    bool is_distinct(const Call& call, int32_t index) const override {
        const Dcnv3Params p = make_params(call.inputs[kInputIdx].dims);
        const DType dtype = dtype_of(call.inputs[kInputIdx].type);
        return parameter_error(p, dtype) != nullptr || config_is_distinct(p, dtype, index);
    }

    cudaError_t launch(const Call& call, const void* const* inputs, void* output, int32_t tactic, cudaStream_t stream,
                       const char*& refused) const override {
        Dcnv3Params p = make_params(call.inputs[kInputIdx].dims);
        p.input = inputs[kInputIdx];
        const DType dtype = dtype_of(call.inputs[kInputIdx].type);
        p.offset = inputs[kOffsetIdx];
        p.mask = packed() ? static_cast<const char*>(p.offset) + 2 * points() * scalar_bytes(dtype) : inputs[kMaskIdx];
        p.output = output;
        refused = parameter_error(p, dtype);
        return refused ? cudaErrorInvalidValue : launch_dcnv3(p, dtype, tactic, stream);
    }

  private:
    bool packed() const { return type().inputs == kPackedInputs; }
    // Of all groups.
    int64_t points() const { return int64_t{attributes_.group} * attributes_.kernel_h * attributes_.kernel_w; }
    Dcnv3Params make_params(const Dims& input) const;

    Attributes attributes_;
};

std::string Dcnv3Operator::mismatch(const Call& call) const {
    const Attributes& a = attributes_;
    const int64_t channels = int64_t{a.group} * a.group_channels;
    const Dims& input = call.inputs[kInputIdx].dims;
    std::string error = compare("input", input, {kUnknown, kUnknown, kUnknown, channels});
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
    const auto check = [&](const char* name, const Dims& dims, int64_t depth) {
        if (error.empty()) error = compare(name, dims, {input.d[0], sides[0], sides[1], depth});
    };
    check(type().inputs[kOffsetIdx].name, call.inputs[kOffsetIdx].dims, points() * (packed() ? 3 : 2));
    if (!packed()) check("mask", call.inputs[kMaskIdx].dims, points());
    check("output", call.outputs[0].dims, channels);
    return error;
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
    p.allow_half = a.allow_half;
    set_dense_strides(p);
    if (packed()) p.offset_strides = p.mask_strides = dense_strides(p.out_height, p.out_width, points() * 3);
    return p;
}

std::unique_ptr<Operator> create(const OperatorType& type, const char* layer, const PluginFieldCollection* fields) {
    Attributes attributes{};
    const std::string error = read_attributes(fields, attributes);
    if (!error.empty()) {
        log_error(named(type, layer, error));
        return nullptr;
    }
    return std::make_unique<Dcnv3Operator>(type, layer != nullptr ? layer : "", attributes);
}

std::unique_ptr<Operator> deserialize(const OperatorType& type, const char* layer, const void* data, size_t size) {
    Blob blob{};
    if (data != nullptr && size == sizeof(blob)) memcpy(&blob, data, sizeof(blob));
    if (blob.tag != kTag) return refuse_bytes(type, layer, size);
    // An engine is a file and may be damaged: its attributes pass the same checks as a parser's.
    const std::vector<nvinfer1::PluginField> fields = attribute_fields(blob.attributes);
    const PluginFieldCollection collection{static_cast<int32_t>(fields.size()), fields.data()};
    return create(type, layer, &collection);
}

const PluginFieldCollection* own_names() { return attribute_names(false); }

const PluginFieldCollection* official_names() { return attribute_names(true); }

}  // namespace

const OperatorType kDcnv3 = {"DCNv3", kInputs, 3, 4, own_names, create, deserialize};
const OperatorType kPackedDcnv3 = {"DCNv3Packed", kPackedInputs, 2, 4, own_names, create, deserialize};
const OperatorType kOfficialDcnv3 = {"TRTDCNv3", kInputs, 3, 4, official_names, create, deserialize};

}  // namespace internimage
