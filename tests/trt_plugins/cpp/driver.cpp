// SPDX-License-Identifier: Apache-2.0
// A stand-in for TensorRT's builder and runtime: it drives the plugin through the exported functions, as the library
// is loaded, and runs the kernel on the host. Python calls it through C functions.
#include <NvInferRuntime.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "kernel/dcnv3_host.h"
#include "kernel/dcnv3_launch.h"
#include "kernel/ms_deform_attn_host.h"
#include "kernel/ms_deform_attn_launch.h"
#include "kernel/upsample_argmax_host.h"
#include "kernel/upsample_argmax_launch.h"
#include "plugin/plugin_registration.h"
#include "register/tensorrt_layout.h"

extern "C" void setLoggerFinder(nvinfer1::ILoggerFinder* finder);
extern "C" nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count);

namespace internimage {

int32_t g_last_tactic = -1;
cudaError_t g_launch_result = cudaSuccess;

template <typename Params>
cudaError_t launch_on_host(const Params& p, DType dtype, int32_t tactic) {
    g_last_tactic = tactic;
    if (g_launch_result != cudaSuccess) return g_launch_result;
    return run_on_host(p, dtype, tactic, nullptr) == nullptr ? cudaSuccess : cudaErrorInvalidValue;
}

// In the place of the *_launch.cpp: the same kernels on host addresses.
cudaError_t launch_dcnv3(const Dcnv3Params& p, DType dtype, int32_t tactic, cudaStream_t) {
    return launch_on_host(p, dtype, tactic);
}

cudaError_t launch_ms_deform_attn(const MsDeformAttnParams& p, DType dtype, int32_t tactic, cudaStream_t) {
    return launch_on_host(p, dtype, tactic);
}

cudaError_t launch_upsample_argmax(const UpsampleArgmaxParams& p, DType dtype, int32_t tactic, cudaStream_t) {
    return launch_on_host(p, dtype, tactic);
}

}  // namespace internimage

using namespace nvinfer1;

namespace {

struct Logger : ILogger {
    std::string messages;
    void log(Severity, const char* message) noexcept override { messages += std::string(message) + "\n"; }
} g_logger;

struct Finder : ILoggerFinder {
    ILogger* findLogger() override { return &g_logger; }
} g_finder;

// The same as TensorRT 11 has them.
template <typename Base>
struct Versioned : Base {
    static void unexpected() { g_logger.messages += "a function of IVersionedInterface was called\n"; }
    void getAPILanguage() override { unexpected(); }
    void getInterfaceInfo() override { unexpected(); }
    void destructor() override { unexpected(); }
    void deleting_destructor() override { unexpected(); }
};

struct NewLogger : Versioned<internimage::Logger11> {
    void log(int32_t, const char* message) noexcept override { g_logger.messages += std::string(message) + "\n"; }
} g_new_logger;

struct NewFinder : Versioned<internimage::LoggerFinder11> {
    void* findLogger() override { return &g_new_logger; }
} g_new_finder;

int32_t g_version = NV_TENSORRT_MAJOR * 10000;

// An expression over the input's dimensions; variables are not constants, as with dynamic shapes.
struct Expression : IDimensionExpr, apiv::VDimensionExpr {
    enum Kind { kVariable, kConstant, kOperation } kind;
    int64_t value = 0;  // of a constant, or a variable's index
    DimensionOperation op{};
    const Expression* first = nullptr;
    const Expression* second = nullptr;

    explicit Expression(Kind k) : kind(k) { mImpl = this; }
    ~Expression() noexcept override = default;
    bool isConstant() const override { return kind == kConstant; }
    int64_t getConstantValue() const override { return kind == kConstant ? value : -1; }
    bool isSizeTensor() const override { return false; }

    int64_t evaluate(const int64_t* variables) const {
        if (kind == kVariable) return variables[value];
        if (kind == kConstant) return value;
        const int64_t a = first->evaluate(variables);
        const int64_t b = second->evaluate(variables);
        switch (op) {
            case DimensionOperation::kSUM:
                return a + b;
            case DimensionOperation::kPROD:
                return a * b;
            case DimensionOperation::kSUB:
                return a - b;
            case DimensionOperation::kFLOOR_DIV:
                return a / b - (a % b != 0 && (a < 0) != (b < 0));
            default:
                return INT64_MIN;
        }
    }
};

struct Builder : IExprBuilder, apiv::VExprBuilder {
    std::vector<std::unique_ptr<Expression>> made;

    Builder() { mImpl = this; }
    ~Builder() noexcept override = default;
    Expression* add(Expression::Kind kind) {
        made.push_back(std::make_unique<Expression>(kind));
        return made.back().get();
    }
    // TensorRT promises nothing about negative ones.
    const IDimensionExpr* constant(int64_t value) override {
        if (value < 0) g_logger.messages += "a negative constant\n";
        Expression* e = add(Expression::kConstant);
        e->value = value;
        return e;
    }
    const IDimensionExpr* operation(DimensionOperation op, const IDimensionExpr& a, const IDimensionExpr& b) override {
        Expression* e = add(Expression::kOperation);
        e->op = op;
        e->first = static_cast<const Expression*>(&a);
        e->second = static_cast<const Expression*>(&b);
        return e;
    }
    const IDimensionExpr* declareSizeTensor(int32_t, const IDimensionExpr&, const IDimensionExpr&) override {
        return nullptr;
    }
};

// A row of `dims` per tensor: the number of dimensions, then eight of them.
constexpr int32_t kRow = 1 + Dims::MAX_DIMS;

// `count` inputs and the output after them.
std::vector<PluginTensorDesc> descriptions(const int64_t* dims, const int32_t* types, int32_t count) {
    std::vector<PluginTensorDesc> result(count + 1);
    for (int32_t t = 0; t <= count; ++t) {
        result[t].dims.nbDims = static_cast<int32_t>(dims[kRow * t]);
        for (int32_t i = 0; i < Dims::MAX_DIMS; ++i) result[t].dims.d[i] = dims[kRow * t + 1 + i];
        result[t].type = static_cast<DataType>(types[t]);
        result[t].format = TensorFormat::kLINEAR;
    }
    return result;
}

std::vector<DynamicPluginTensorDesc> dynamic(const std::vector<PluginTensorDesc>& descs) {
    std::vector<DynamicPluginTensorDesc> result(descs.size());
    for (size_t i = 0; i < descs.size(); ++i) {
        result[i].desc = descs[i];
        result[i].min = result[i].max = descs[i].dims;
    }
    return result;
}

#if PLUGIN_INTERFACE == 3
using Plugin = IPluginV3;
using Creator = IPluginCreatorV3One;
IPluginV3OneBuild* build_part(Plugin* p) {
    return static_cast<IPluginV3OneBuild*>(p->getCapabilityInterface(PluginCapabilityType::kBUILD));
}
IPluginV3OneRuntime* runtime_part(Plugin* p) {
    return static_cast<IPluginV3OneRuntime*>(p->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
}
#else
using Plugin = IPluginV2DynamicExt;
using Creator = IPluginCreator;
Plugin* runtime_part(Plugin* p) { return p; }
#endif

Creator* find_creator(const char* name) {
    int32_t count = 0;
    IPluginCreatorInterface* const* creators = getCreators(count);
    for (int32_t i = 0; i < count; ++i) {
        auto* creator = static_cast<Creator*>(creators[i]);
        if (strcmp(creator->getPluginName(), name) == 0 && strcmp(creator->getPluginVersion(), "1") == 0 &&
            strcmp(creator->getPluginNamespace(), "") == 0) {
            return creator;
        }
    }
    return nullptr;
}

Plugin* create(const char* name, const PluginFieldCollection* fields) {
#if PLUGIN_INTERFACE == 3
    return find_creator(name)->createPlugin("layer7", fields, TensorRTPhase::kBUILD);
#else
    return static_cast<Plugin*>(find_creator(name)->createPlugin("layer7", fields));
#endif
}

}  // namespace

#define DRIVER extern "C" __attribute__((visibility("default")))

// The plugin asks the library that its logger comes from, which is this one.
DRIVER int32_t getInferLibVersion() { return g_version; }

DRIVER void driver_start() { setLoggerFinder(&g_finder); }

// Start again as TensorRT `major`.
DRIVER void driver_start_as(int32_t major) {
    g_version = major < 10 ? major * 1000 : major * 10000;
    setLoggerFinder(major < 11 ? &g_finder : reinterpret_cast<ILoggerFinder*>(&g_new_finder));
}

DRIVER const char* driver_take_log() {
    static std::string taken;
    taken = g_logger.messages;
    g_logger.messages.clear();
    return taken.c_str();
}

DRIVER const char* driver_field_names(const char* creator) {
    static std::string names;
    names.clear();
    const PluginFieldCollection* fields = find_creator(creator)->getFieldNames();
    for (int32_t i = 0; i < fields->nbFields; ++i) names += std::string(fields->fields[i].name) + " ";
    return names.c_str();
}

// `types` are PluginFieldType, `values` the addresses of the data (0 for none).
DRIVER void* driver_create(const char* creator, int32_t count, const char* const* names, const int32_t* types,
                           const void* const* values, const int32_t* lengths) {
    std::vector<PluginField> fields;
    for (int32_t i = 0; i < count; ++i) {
        fields.emplace_back(names[i], values[i], static_cast<PluginFieldType>(types[i]), lengths[i]);
    }
    const PluginFieldCollection collection{count, fields.data()};
    return create(creator, &collection);
}

DRIVER void* driver_create_from_nothing(const char* creator) { return create(creator, nullptr); }

DRIVER void driver_destroy(void* plugin) {
#if PLUGIN_INTERFACE == 3
    delete static_cast<Plugin*>(plugin);
#else
    static_cast<Plugin*>(plugin)->destroy();
#endif
}

DRIVER void* driver_clone(void* plugin) { return static_cast<Plugin*>(plugin)->clone(); }

// Serialises and creates again, as a runtime does; `damage` shortens or changes the bytes (V2 only).
DRIVER void* driver_reload(void* plugin, int32_t damage) {
#if PLUGIN_INTERFACE == 3
    static_cast<void>(damage);
    auto* core = static_cast<IPluginV3OneCore*>(
        static_cast<Plugin*>(plugin)->getCapabilityInterface(PluginCapabilityType::kCORE));
    const PluginFieldCollection* fields = runtime_part(static_cast<Plugin*>(plugin))->getFieldsToSerialize();
    Plugin* made = find_creator(core->getPluginName())->createPlugin("layer7", fields, TensorRTPhase::kRUNTIME);
    if (made == nullptr) return nullptr;
    Plugin* attached = runtime_part(made)->attachToContext(nullptr);
    delete made;
    return attached;
#else
    auto* p = static_cast<Plugin*>(plugin);
    std::vector<char> bytes(p->getSerializationSize());
    p->serialize(bytes.data());
    if (damage == 1) bytes.pop_back();
    if (damage == 2) bytes[0] ^= 1;
    if (damage == 3) memset(bytes.data() + 4, 0xff, 4);
    return static_cast<Plugin*>(
        find_creator(p->getPluginType())->deserializePlugin("layer7", bytes.data(), bytes.size()));
#endif
}

DRIVER const char* driver_name(void* plugin) {
#if PLUGIN_INTERFACE == 3
    return static_cast<IPluginV3OneCore*>(
               static_cast<Plugin*>(plugin)->getCapabilityInterface(PluginCapabilityType::kCORE))
        ->getPluginName();
#else
    return static_cast<Plugin*>(plugin)->getPluginType();
#endif
}

// The output's dimensions for inputs whose dimensions are all dynamic; returns their number, or a negative status.
DRIVER int32_t driver_output_shape(void* plugin, const int64_t* dims, int32_t count, int64_t* output) {
    Builder builder;
    std::vector<DimsExprs> shapes(count);
    for (int32_t t = 0; t < count; ++t) {
        shapes[t].nbDims = static_cast<int32_t>(dims[kRow * t]);
        for (int32_t i = 0; i < shapes[t].nbDims; ++i) {
            Expression* variable = builder.add(Expression::kVariable);
            variable->value = kRow * t + 1 + i;
            shapes[t].d[i] = variable;
        }
    }
    DimsExprs result{};
#if PLUGIN_INTERFACE == 3
    const int32_t status = build_part(static_cast<Plugin*>(plugin))
                               ->getOutputShapes(shapes.data(), count, nullptr, 0, &result, 1, builder);
    if (status != 0) return status;
#else
    result = static_cast<Plugin*>(plugin)->getOutputDimensions(0, shapes.data(), count, builder);
    if (result.nbDims == 0) return -1;
#endif
    for (int32_t i = 0; i < result.nbDims; ++i) {
        output[i] = static_cast<const Expression*>(result.d[i])->evaluate(dims);
    }
    return result.nbDims;
}

// `types` and `formats` have an entry for every tensor up to `position`.
DRIVER int32_t driver_supports(void* plugin, int32_t position, const int32_t* types, const int32_t* formats,
                               int32_t inputs, int32_t outputs) {
    std::vector<PluginTensorDesc> descs(position + 1);
    for (int32_t i = 0; i <= position; ++i) {
        descs[i].type = static_cast<DataType>(types[i]);
        descs[i].format = static_cast<TensorFormat>(formats[i]);
    }
#if PLUGIN_INTERFACE == 3
    return build_part(static_cast<Plugin*>(plugin))
        ->supportsFormatCombination(position, dynamic(descs).data(), inputs, outputs);
#else
    return static_cast<Plugin*>(plugin)->supportsFormatCombination(position, descs.data(), inputs, outputs);
#endif
}

// The output's type for `count` inputs, the first of `type`.
DRIVER int32_t driver_output_type(void* plugin, int32_t type, int32_t count) {
    std::vector<DataType> types(count, DataType::kINT8);
    types[0] = static_cast<DataType>(type);
#if PLUGIN_INTERFACE == 3
    DataType output{};
    build_part(static_cast<Plugin*>(plugin))->getOutputDataTypes(&output, 1, types.data(), count);
    return static_cast<int32_t>(output);
#else
    return static_cast<int32_t>(static_cast<Plugin*>(plugin)->getOutputDataType(0, types.data(), count));
#endif
}

// `count` inputs are described, and `inputs` of them offered. 0, or the failure; V2 cannot refuse here and only logs.
DRIVER int32_t driver_configure(void* plugin, const int64_t* dims, const int32_t* types, int32_t count,
                                int32_t inputs) {
    const auto descs = dynamic(descriptions(dims, types, count));
#if PLUGIN_INTERFACE == 3
    return build_part(static_cast<Plugin*>(plugin))->configurePlugin(descs.data(), inputs, descs.data() + count, 1);
#else
    static_cast<Plugin*>(plugin)->configurePlugin(descs.data(), inputs, descs.data() + count, 1);
    return 0;
#endif
}

DRIVER int32_t driver_enqueue(void* plugin, const int64_t* dims, const int32_t* types, int32_t count,
                              const void* const* inputs, void* output) {
    const auto descs = descriptions(dims, types, count);
    auto* runtime = runtime_part(static_cast<Plugin*>(plugin));
    return runtime->enqueue(descs.data(), descs.data() + count, inputs, &output, nullptr, nullptr);
}

DRIVER void driver_fail_launches(int32_t cuda_error) {
    internimage::g_launch_result = static_cast<cudaError_t>(cuda_error);
}

DRIVER int32_t driver_last_tactic() { return internimage::g_last_tactic; }

#if PLUGIN_INTERFACE == 3
DRIVER int32_t driver_shape_change(void* plugin, const int64_t* dims, const int32_t* types, int32_t count) {
    const auto descs = descriptions(dims, types, count);
    return runtime_part(static_cast<Plugin*>(plugin))->onShapeChange(descs.data(), count, descs.data() + count, 1);
}

DRIVER int32_t driver_tactics(void* plugin, int32_t* tactics) {
    auto* build = build_part(static_cast<Plugin*>(plugin));
    const int32_t count = build->getNbTactics();
    return build->getValidTactics(tactics, count) == 0 ? count : -1;
}

DRIVER int32_t driver_set_tactic(void* plugin, int32_t tactic) {
    return runtime_part(static_cast<Plugin*>(plugin))->setTactic(tactic);
}

DRIVER const char* driver_timing_id(void* plugin) {
    return build_part(static_cast<Plugin*>(plugin))->getTimingCacheID();
}
#endif
