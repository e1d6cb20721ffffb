// SPDX-License-Identifier: Apache-2.0
#include "upsample_argmax_operator.h"

#include "kernel/upsample_argmax_launch.h"
#include "plain_operator.h"

namespace internimage {
namespace {

using nvinfer1::DataType;
using nvinfer1::DimensionOperation;
using nvinfer1::Dims;
using nvinfer1::DimsExprs;
using nvinfer1::IExprBuilder;

constexpr TensorInfo kInputs[] = {{"logits", 4}};

class UpsampleArgmaxOperator final : public PlainOperator<UpsampleArgmaxOperator> {
  public:
    using PlainOperator::PlainOperator;

    static constexpr uint32_t kTag = 0x31415055;  // "UPA1", first layout

    std::string timing_id() const override { return "internimage-upsample-argmax-" + std::to_string(kTacticsRevision); }

    // TensorRT takes UINT8 neither from a plugin nor for one.
    DataType output_type(DataType /*first*/) const override { return DataType::kINT32; }

  protected:
    DimsExprs output_dims(const DimsExprs* inputs, IExprBuilder& builder) const override {
        const auto upsampled = [&](int32_t dimension) {
            return builder.operation(DimensionOperation::kPROD, *inputs[0].d[dimension],
                                     *builder.constant(kUpsampleFactor));
        };
        DimsExprs output{};
        output.nbDims = 3;
        output.d[0] = inputs[0].d[0];
        output.d[1] = upsampled(2);
        output.d[2] = upsampled(3);
        return output;
    }

    bool takes(int32_t position, DataType type, DataType /*first*/) const override {
        return position == 0 ? is_floating(type) : type == DataType::kINT32;
    }

    std::string mismatch(const Call& call) const override {
        const Dims& logits = call.inputs[0].dims;
        const auto upsampled = [](int64_t side) { return side >= 0 ? side * kUpsampleFactor : kUnknown; };
        return compare("output", call.outputs[0].dims, {logits.d[0], upsampled(logits.d[2]), upsampled(logits.d[3])});
    }

    bool is_distinct(const Call& call, int32_t index) const override {
        const UpsampleArgmaxParams p = make_params(call);
        const DType dtype = dtype_of(call.inputs[0].type);
        return parameter_error(p, dtype) != nullptr || config_is_distinct(p, dtype, index);
    }

    cudaError_t launch(const Call& call, const void* const* inputs, void* output, int32_t tactic, cudaStream_t stream,
                       const char*& refused) const override {
        UpsampleArgmaxParams p = make_params(call);
        p.logits = inputs[0];
        p.labels = static_cast<int32_t*>(output);
        const DType dtype = dtype_of(call.inputs[0].type);
        refused = parameter_error(p, dtype);
        return refused ? cudaErrorInvalidValue : launch_upsample_argmax(p, dtype, tactic, stream);
    }

  private:
    static UpsampleArgmaxParams make_params(const Call& call) {
        const Dims& logits = call.inputs[0].dims;
        UpsampleArgmaxParams p{};
        p.batch = static_cast<int32_t>(logits.d[0]);
        p.classes = static_cast<int32_t>(logits.d[1]);
        p.height = static_cast<int32_t>(logits.d[2]);
        p.width = static_cast<int32_t>(logits.d[3]);
        return p;
    }
};

}  // namespace

const OperatorType kUpsampleArgmax = {
    "UpsampleArgmax",
    kInputs,
    1,
    3,
    UpsampleArgmaxOperator::field_names,
    UpsampleArgmaxOperator::create,
    UpsampleArgmaxOperator::deserialize,
};

}  // namespace internimage
