// SPDX-License-Identifier: Apache-2.0
// What operators without attributes share. `Self` is the operator, and Self::kTag, in the engines of IPluginV2, tells
// its blob from a foreign one.
#pragma once

#include <cstring>

#include "operator.h"
#include "plugin_log.h"

namespace internimage {

template <typename Self>
class PlainOperator : public Operator {
  public:
    using Operator::Operator;

    std::unique_ptr<Operator> clone() const override { return std::make_unique<Self>(type(), layer()); }

    std::vector<nvinfer1::PluginField> fields() const override { return {}; }

    std::string serialize() const override {
        const uint32_t tag = Self::kTag;
        return std::string(reinterpret_cast<const char*>(&tag), sizeof(tag));
    }

    static std::unique_ptr<Operator> create(const OperatorType& type, const char* layer,
                                            const nvinfer1::PluginFieldCollection* fields) {
        // No collection at all is as good as one without fields.
        const int32_t count = fields != nullptr && fields->fields != nullptr ? fields->nbFields : 0;
        for (int32_t i = 0; i < count; ++i) {
            const std::string name = fields->fields[i].name != nullptr ? fields->fields[i].name : "";
            if (!is_plugin_field(name)) {
                log_error(internimage::named(type, layer, "unknown attribute '" + name + "': expected none"));
                return nullptr;
            }
        }
        return std::make_unique<Self>(type, layer != nullptr ? layer : "");
    }

    static std::unique_ptr<Operator> deserialize(const OperatorType& type, const char* layer, const void* data,
                                                 size_t size) {
        const uint32_t tag = Self::kTag;
        if (data == nullptr || size != sizeof(tag) || memcmp(data, &tag, sizeof(tag)) != 0) {
            return refuse_bytes(type, layer, size);
        }
        return create(type, layer, nullptr);
    }

    static const nvinfer1::PluginFieldCollection* field_names() {
        static const nvinfer1::PluginFieldCollection none{0, nullptr};
        return &none;
    }
};

}  // namespace internimage
