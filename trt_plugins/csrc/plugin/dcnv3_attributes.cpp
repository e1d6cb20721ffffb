// SPDX-License-Identifier: Apache-2.0
#include "dcnv3_attributes.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>

#include "operator.h"

namespace internimage {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;

// PluginFieldType::kINT64, which TensorRT 8 does not name.
constexpr auto kInt64 = static_cast<PluginFieldType>(10);

// How many images the official kernel takes at once; it does not change what is computed.
constexpr const char* kIgnored = "im2col_step";

std::string read_integer(const PluginField& field, const IntegerAttribute& attribute, Attributes& attributes) {
    const std::string name = attribute.name;
    if (field.data == nullptr || field.length != 1 || (field.type != PluginFieldType::kINT32 && field.type != kInt64)) {
        return name + " must be one integer (INT32 or INT64)";
    }
    int64_t value = 0;
    if (field.type == kInt64) {
        memcpy(&value, field.data, sizeof(value));
    } else {
        int32_t narrow = 0;
        memcpy(&narrow, field.data, sizeof(narrow));
        value = narrow;
    }
    if (value < attribute.minimum || value > attribute.maximum) {
        return name + " is " + std::to_string(value) + ": expected " + std::to_string(attribute.minimum) + " to " +
               std::to_string(attribute.maximum);
    }
    attributes.*attribute.member = static_cast<int32_t>(value);
    return {};
}

std::string read_offset_scale(const PluginField& field, Attributes& attributes) {
    if (field.data == nullptr || field.length != 1 ||
        (field.type != PluginFieldType::kFLOAT32 && field.type != PluginFieldType::kFLOAT64)) {
        return std::string(kOffsetScale) + " must be one float (FLOAT32 or FLOAT64)";
    }
    double value = 0;
    if (field.type == PluginFieldType::kFLOAT64) {
        memcpy(&value, field.data, sizeof(value));
    } else {
        float narrow = 0;
        memcpy(&narrow, field.data, sizeof(narrow));
        value = narrow;
    }
    attributes.offset_scale = static_cast<float>(value);
    if (!std::isfinite(attributes.offset_scale)) return std::string(kOffsetScale) + " is not finite";
    return {};
}

PluginFieldCollection collection(const std::vector<PluginField>& fields) {
    return {static_cast<int32_t>(fields.size()), fields.data()};
}

std::vector<PluginField> name_fields(bool official) {
    static const Attributes none{};
    std::vector<PluginField> fields = attribute_fields(none);
    for (PluginField& field : fields) {
        field.data = nullptr;
        field.length = 0;
    }
    if (official) fields.emplace_back(kIgnored, nullptr, PluginFieldType::kINT32, 0);
    return fields;
}

}  // namespace

const PluginFieldCollection* attribute_names(bool official) {
    static const std::vector<PluginField> own_fields = name_fields(false);
    static const std::vector<PluginField> official_fields = name_fields(true);
    static const PluginFieldCollection own = collection(own_fields);
    static const PluginFieldCollection with_official = collection(official_fields);
    return official ? &with_official : &own;
}

std::string read_attributes(const PluginFieldCollection* fields, Attributes& attributes) {
    if (fields == nullptr || (fields->nbFields > 0 && fields->fields == nullptr)) return "no attributes were given";
    attributes.offset_scale = kDefaultOffsetScale;
    bool seen[std::size(kIntegerAttributes)] = {};
    for (const IntegerAttribute& attribute : kIntegerAttributes) attributes.*attribute.member = attribute.fallback;

    for (int32_t i = 0; i < fields->nbFields; ++i) {
        const PluginField& field = fields->fields[i];
        const std::string name = field.name != nullptr ? field.name : "";
        const auto* found = std::find_if(std::begin(kIntegerAttributes), std::end(kIntegerAttributes),
                                         [&](const IntegerAttribute& attribute) { return name == attribute.name; });
        std::string error;
        if (found != std::end(kIntegerAttributes)) {
            seen[found - kIntegerAttributes] = true;
            error = read_integer(field, *found, attributes);
        } else if (name == kOffsetScale) {
            error = read_offset_scale(field, attributes);
        } else if (name != kIgnored && !is_plugin_field(name)) {
            error = "unknown attribute '" + name + "'";
        }
        if (!error.empty()) return error;
    }
    for (size_t i = 0; i < std::size(kIntegerAttributes); ++i) {
        if (kIntegerAttributes[i].required && !seen[i]) {
            return std::string("attribute ") + kIntegerAttributes[i].name + " is missing and has no default";
        }
    }
    return {};
}

std::vector<PluginField> attribute_fields(const Attributes& attributes) {
    std::vector<PluginField> fields;
    for (const IntegerAttribute& attribute : kIntegerAttributes) {
        fields.emplace_back(attribute.name, &(attributes.*attribute.member), PluginFieldType::kINT32, 1);
    }
    fields.emplace_back(kOffsetScale, &attributes.offset_scale, PluginFieldType::kFLOAT32, 1);
    return fields;
}

}  // namespace internimage
