// SPDX-License-Identifier: Apache-2.0
// What both plugin interfaces are written over: an operator's shapes, formats and launch, in TensorRT's vocabulary.
#pragma once

#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

#include "kernel/scalar.h"

namespace internimage {

class Operator;

struct TensorInfo {
    const char* name;
    int32_t rank;
};

// An operator as its creator needs it. There is one output, "output".
struct OperatorType {
    const char* name;  // the plugin's
    const TensorInfo* inputs;
    int32_t input_count;
    int32_t output_rank;
    // Every attribute.
    const nvinfer1::PluginFieldCollection* (*field_names)();
    // An instance with the attributes of a parser or an engine; nullptr after logging why not.
    std::unique_ptr<Operator> (*create)(const OperatorType& type, const char* layer,
                                        const nvinfer1::PluginFieldCollection* fields);
    // An instance from what Operator::serialize() gave; nullptr after logging why not.
    std::unique_ptr<Operator> (*deserialize)(const OperatorType& type, const char* layer, const void* data,
                                             size_t size);
};

// The tensors of one call. A dimension that is not known yet is negative.
struct Call {
    const nvinfer1::PluginTensorDesc* inputs;
    const nvinfer1::PluginTensorDesc* outputs;
};

class Operator {
  public:
    Operator(const OperatorType& type, std::string layer) : type_(type), layer_(std::move(layer)) {}
    virtual ~Operator() = default;

    const OperatorType& type() const { return type_; }
    const std::string& layer() const { return layer_; }

    virtual std::unique_ptr<Operator> clone() const = 0;

    // Fields that point into this object; OperatorType::create takes them back.
    virtual std::vector<nvinfer1::PluginField> fields() const = 0;

    // What IPluginV2 keeps in an engine.
    virtual std::string serialize() const = 0;

    // What timings depend on besides shapes and formats.
    virtual std::string timing_id() const = 0;

    // The output's type where input 0 is of `first`.
    virtual nvinfer1::DataType output_type(nvinfer1::DataType first) const { return first; }

    // Sets the output's dimensions, as expressions of the inputs'. Returns an empty text, or what is wrong.
    std::string output_shape(const nvinfer1::DimsExprs* inputs, int32_t input_count, nvinfer1::IExprBuilder& builder,
                             nvinfer1::DimsExprs& output) const;

    // Whether tensor `position` (inputs, then the output) may have this type and format, given those before it.
    bool supports(int32_t position, const nvinfer1::PluginTensorDesc* tensors, int32_t inputs, int32_t outputs) const;

    // Empty, or what is wrong with which tensor, with all shapes.
    std::string shape_error(const Call& call, int32_t input_count, int32_t output_count) const;

    // Tactics for these shapes, without those that come to the same launch.
    std::vector<int32_t> tactics(const Call& call) const;

    // Enqueues the kernel. Returns 0, or a CUDA error code after logging it with the shapes.
    int32_t enqueue(const Call& call, const void* const* inputs, void* const* outputs, int32_t tactic,
                    cudaStream_t stream) const;

    // `message` behind the layer's name.
    std::string named(const std::string& message) const;

  protected:
    virtual nvinfer1::DimsExprs output_dims(const nvinfer1::DimsExprs* inputs,
                                            nvinfer1::IExprBuilder& builder) const = 0;
    // Whether tensor `position` may be of `type` where input 0 is of `first`.
    virtual bool takes(int32_t position, nvinfer1::DataType type, nvinfer1::DataType first) const = 0;
    // Empty, or what is wrong. Counts and ranks are right.
    virtual std::string mismatch(const Call& call) const = 0;
    // Whether configuration `index` differs from every earlier one. All dimensions are known and positive.
    virtual bool is_distinct(const Call& call, int32_t index) const = 0;
    // Sets `refused` where the kernel cannot run these tensors.
    virtual cudaError_t launch(const Call& call, const void* const* inputs, void* output, int32_t tactic,
                               cudaStream_t stream, const char*& refused) const = 0;

  private:
    std::string count_error(int32_t inputs, int32_t outputs) const;
    std::string shapes(const Call& call) const;

    const OperatorType& type_;
    std::string layer_;
};

// A floating-point type that the kernels compute with.
bool is_floating(nvinfer1::DataType type);
DType dtype_of(nvinfer1::DataType type);

constexpr int64_t kUnknown = -1;

// Compares a tensor's dimensions with the expected ones, where both are known. Empty, or the first difference.
std::string compare(const char* name, const nvinfer1::Dims& dims, std::initializer_list<int64_t> expected);

// "NAME 'LAYER': message".
std::string named(const OperatorType& type, const char* layer, const std::string& message);

// Parsers hand these on with a node's attributes; they do not change what is computed.
bool is_plugin_field(const std::string& name);

// Logs that bytes of an engine were not written by this plugin.
std::unique_ptr<Operator> refuse_bytes(const OperatorType& type, const char* layer, size_t size);

}  // namespace internimage
