// SPDX-License-Identifier: Apache-2.0
// What both plugin interfaces share: shapes, formats and the launch, in TensorRT's vocabulary.
#pragma once

#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

#include <string>
#include <vector>

#include "dcnv3_attributes.h"
#include "kernel/dcnv3_params.h"

namespace internimage {

enum Input : int32_t { kInputIdx = 0, kOffsetIdx = 1, kMaskIdx = 2 };
constexpr int32_t kInputs = 3;
constexpr int32_t kOutputs = 1;

class Dcnv3Operator {
  public:
    Dcnv3Operator(const Attributes& attributes, std::string layer);

    const Attributes& attributes() const { return attributes_; }
    const std::string& layer() const { return layer_; }

    // (batch, out_height, out_width, G*C), as expressions of the input's dimensions.
    nvinfer1::DimsExprs output_shape(const nvinfer1::DimsExprs& input, nvinfer1::IExprBuilder& builder) const;

    // Whether tensor `position` (inputs, then the output) may have this type and format, given those before it.
    static bool supports(int32_t position, const nvinfer1::PluginTensorDesc* tensors, int32_t inputs, int32_t outputs);

    // The tensors of one call, -1 for a dimension not known yet. Empty, or the problem with all shapes.
    std::string shape_error(const nvinfer1::PluginTensorDesc* inputs, int32_t input_count,
                            const nvinfer1::PluginTensorDesc* outputs, int32_t output_count) const;

    // Tactics for these shapes, without those that come to the same launch.
    std::vector<int32_t> tactics(const nvinfer1::PluginTensorDesc* inputs) const;

    // Enqueues the kernel. Returns 0, or a CUDA error code after logging it with the shapes.
    int32_t enqueue(const nvinfer1::PluginTensorDesc* input_descs, const nvinfer1::PluginTensorDesc* output_descs,
                    const void* const* inputs, void* const* outputs, int32_t tactic, cudaStream_t stream) const;

    // What timings depend on besides shapes and formats.
    std::string timing_id() const;

    // `message` behind the layer's name.
    std::string named(const std::string& message) const { return "DCNv3 '" + layer_ + "': " + message; }

  private:
    Dcnv3Params make_params(const nvinfer1::Dims& input) const;

    Attributes attributes_;
    std::string layer_;
};

// The creators' common part: the operator, or nothing after logging why.
bool create_operator(const char* layer, const nvinfer1::PluginFieldCollection* fields, Attributes& attributes);

}  // namespace internimage
