// SPDX-License-Identifier: Apache-2.0
// The node's attributes: their table, and reading them from what a parser or an engine gives.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <string>
#include <vector>

namespace internimage {

struct Attributes {
    int32_t kernel_h;
    int32_t kernel_w;
    int32_t stride_h;
    int32_t stride_w;
    int32_t pad_h;
    int32_t pad_w;
    int32_t dilation_h;
    int32_t dilation_w;
    int32_t group;
    int32_t group_channels;
    float offset_scale;
    int32_t mask_softmax;
    int32_t allow_half;  // not in the ONNX operator: whether float16 values may be interpolated in float16
};

// One row per integer attribute; `offset_scale` is the one float.
struct IntegerAttribute {
    const char* name;
    int32_t Attributes::* member;
    int32_t fallback;
    int32_t minimum;
    int32_t maximum;
    bool required;
};

// Large enough for any use, small enough that no product of two overflows 64 bits or a sum 32.
constexpr int32_t kMaxAttribute = 1 << 20;

constexpr IntegerAttribute kIntegerAttributes[] = {
    {"kernel_h", &Attributes::kernel_h, 3, 1, kMaxAttribute, false},
    {"kernel_w", &Attributes::kernel_w, 3, 1, kMaxAttribute, false},
    {"stride_h", &Attributes::stride_h, 1, 1, kMaxAttribute, false},
    {"stride_w", &Attributes::stride_w, 1, 1, kMaxAttribute, false},
    {"pad_h", &Attributes::pad_h, 1, 0, kMaxAttribute, false},
    {"pad_w", &Attributes::pad_w, 1, 0, kMaxAttribute, false},
    {"dilation_h", &Attributes::dilation_h, 1, 1, kMaxAttribute, false},
    {"dilation_w", &Attributes::dilation_w, 1, 1, kMaxAttribute, false},
    {"group", &Attributes::group, 0, 1, kMaxAttribute, true},
    {"group_channels", &Attributes::group_channels, 0, 1, kMaxAttribute, true},
    {"mask_softmax", &Attributes::mask_softmax, 0, 0, 1, false},
    {"allow_half", &Attributes::allow_half, 0, 0, 1, false},
};
constexpr const char* kOffsetScale = "offset_scale";
constexpr float kDefaultOffsetScale = 1.0f;

// Every name, for a creator's getFieldNames(). With `official` also those that InternImage's exporter adds and that
// mean nothing here.
const nvinfer1::PluginFieldCollection* attribute_names(bool official);

// Reads `fields` into `attributes`. Returns an empty string, or what is wrong with which attribute.
std::string read_attributes(const nvinfer1::PluginFieldCollection* fields, Attributes& attributes);

// Fields that point into `attributes`; read_attributes() takes them back.
std::vector<nvinfer1::PluginField> attribute_fields(const Attributes& attributes);

}  // namespace internimage
