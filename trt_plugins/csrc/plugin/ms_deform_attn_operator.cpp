// SPDX-License-Identifier: Apache-2.0
#include "ms_deform_attn_operator.h"

#include "kernel/ms_deform_attn_launch.h"
#include "plain_operator.h"

namespace internimage {
namespace {

using nvinfer1::DataType;
using nvinfer1::DimensionOperation;
using nvinfer1::Dims;
using nvinfer1::DimsExprs;
using nvinfer1::IExprBuilder;

enum Input : int32_t { kValueIdx, kShapesIdx, kStartIdx, kLocationsIdx, kWeightsIdx };
constexpr TensorInfo kInputs[] = {
    {"value", 4}, {"spatial_shapes", 2}, {"level_start_index", 1}, {"sampling_locations", 6}, {"attention_weights", 5}};

int64_t known(int64_t dimension, int64_t otherwise) { return dimension >= 0 ? dimension : otherwise; }

class MsDeformAttnOperator final : public PlainOperator<MsDeformAttnOperator> {
  public:
    using PlainOperator::PlainOperator;

    static constexpr uint32_t kTag = 0x3141534d;  // "MSA1", first layout

    std::string timing_id() const override { return "internimage-ms-deform-attn-" + std::to_string(kTacticsRevision); }

  protected:
    DimsExprs output_dims(const DimsExprs* inputs, IExprBuilder& builder) const override {
        const DimsExprs& value = inputs[kValueIdx];
        DimsExprs output{};
        output.nbDims = 3;
        output.d[0] = value.d[0];
        output.d[1] = inputs[kLocationsIdx].d[1];
        output.d[2] = builder.operation(DimensionOperation::kPROD, *value.d[2], *value.d[3]);
        return output;
    }

    bool takes(int32_t position, DataType type, DataType first) const override {
        if (position == kShapesIdx || position == kStartIdx) return type == DataType::kINT32;
        if (position == kLocationsIdx) return type == DataType::kFLOAT;
        return is_floating(type) && type == first;
    }

    std::string mismatch(const Call& call) const override {
        const Dims& value = call.inputs[kValueIdx].dims;
        const Dims& shapes = call.inputs[kShapesIdx].dims;
        const Dims& locations = call.inputs[kLocationsIdx].dims;
        const int64_t batch = value.d[0];
        const int64_t heads = value.d[2];
        const int64_t levels = known(shapes.d[0], locations.d[3]);
        const int64_t queries = locations.d[1];
        const int64_t points = locations.d[4];
        const int64_t channels = heads >= 0 && value.d[3] >= 0 ? heads * value.d[3] : kUnknown;
        std::string error = compare("spatial_shapes", shapes, {kUnknown, 2});
        const auto check = [&](int32_t input, std::initializer_list<int64_t> expected) {
            if (error.empty()) error = compare(kInputs[input].name, call.inputs[input].dims, expected);
        };
        check(kStartIdx, {levels});
        check(kLocationsIdx, {batch, queries, heads, levels, points, 2});
        check(kWeightsIdx, {batch, queries, heads, levels, points});
        if (error.empty()) error = compare("output", call.outputs[0].dims, {batch, queries, channels});
        return error;
    }

    bool is_distinct(const Call& call, int32_t index) const override {
        const MsDeformAttnParams p = make_params(call);
        const DType dtype = dtype_of(call.inputs[kValueIdx].type);
        return parameter_error(p, dtype) != nullptr || config_is_distinct(p, dtype, index);
    }

    cudaError_t launch(const Call& call, const void* const* inputs, void* output, int32_t tactic, cudaStream_t stream,
                       const char*& refused) const override {
        MsDeformAttnParams p = make_params(call);
        p.value = inputs[kValueIdx];
        p.spatial_shapes = static_cast<const int32_t*>(inputs[kShapesIdx]);
        p.level_start_index = static_cast<const int32_t*>(inputs[kStartIdx]);
        p.sampling_locations = static_cast<const float*>(inputs[kLocationsIdx]);
        p.attention_weights = inputs[kWeightsIdx];
        p.output = output;
        const DType dtype = dtype_of(call.inputs[kValueIdx].type);
        refused = parameter_error(p, dtype);
        return refused ? cudaErrorInvalidValue : launch_ms_deform_attn(p, dtype, tactic, stream);
    }

  private:
    static MsDeformAttnParams make_params(const Call& call) {
        const Dims& value = call.inputs[kValueIdx].dims;
        const Dims& locations = call.inputs[kLocationsIdx].dims;
        MsDeformAttnParams p{};
        p.batch = static_cast<int32_t>(value.d[0]);
        p.keys = static_cast<int32_t>(value.d[1]);
        p.heads = static_cast<int32_t>(value.d[2]);
        p.head_channels = static_cast<int32_t>(value.d[3]);
        p.queries = static_cast<int32_t>(locations.d[1]);
        p.levels = static_cast<int32_t>(locations.d[3]);
        p.points = static_cast<int32_t>(locations.d[4]);
        return p;
    }
};

}  // namespace

const OperatorType kMsDeformAttn = {
    "MSDeformAttn",
    kInputs,
    5,
    3,
    MsDeformAttnOperator::field_names,
    MsDeformAttnOperator::create,
    MsDeformAttnOperator::deserialize,
};

}  // namespace internimage
