// SPDX-License-Identifier: Apache-2.0
// TensorRT's plugin registry and logger as their virtual functions lie in memory, by version: for code that is compiled
// once and used with several. Only the named functions are called. tests/trt_plugins/cpp/tensorrt_layout.cpp compares
// these classes with NVIDIA's headers.
#pragma once

#include <cstdint>

namespace internimage {

// TensorRT 8.5 to 9.
class Registry8 {
  public:
    static constexpr const char* kCreators = "getPluginCreators";

    virtual bool registerCreator(void* creator, const char* plugin_namespace) noexcept = 0;
    virtual void* const* list(int32_t* count) const noexcept = 0;  // getPluginCreatorList
    virtual void getPluginCreator() = 0;
    virtual void destructor() = 0;
    virtual void deleting_destructor() = 0;
    virtual void setErrorRecorder() = 0;
    virtual void getErrorRecorder() = 0;
    virtual void deregisterCreator() = 0;
    // Not in 8.5 and 8.6.0:
    virtual void isParentSearchEnabled() = 0;
    virtual void setParentSearchEnabled() = 0;
    virtual void* loadLibrary(const char* path) noexcept = 0;
};

// TensorRT 10.
class Registry10 {
  public:
    static constexpr const char* kCreators = "getCreators";

    virtual void registerCreatorV1() = 0;
    virtual void getPluginCreatorList() = 0;
    virtual void getPluginCreator() = 0;
    virtual void destructor() = 0;
    virtual void deleting_destructor() = 0;
    virtual void setErrorRecorder() = 0;
    virtual void getErrorRecorder() = 0;
    virtual void deregisterCreatorV1() = 0;
    virtual void isParentSearchEnabled() = 0;
    virtual void setParentSearchEnabled() = 0;
    virtual void* loadLibrary(const char* path) noexcept = 0;
    virtual void deregisterLibrary() = 0;
    virtual void registerCreator() = 0;
    virtual void* const* list(int32_t* count) const noexcept = 0;  // getAllCreators
};

// TensorRT 11 dropped what served the creators of IPluginV2.
class Registry11 {
  public:
    static constexpr const char* kCreators = "getCreators";

    virtual void destructor() = 0;
    virtual void deleting_destructor() = 0;
    virtual void setErrorRecorder() = 0;
    virtual void getErrorRecorder() = 0;
    virtual void isParentSearchEnabled() = 0;
    virtual void setParentSearchEnabled() = 0;
    virtual void* loadLibrary(const char* path) noexcept = 0;
    virtual void deregisterLibrary() = 0;
    virtual void registerCreator() = 0;
    virtual void* const* list(int32_t* count) const noexcept = 0;  // getAllCreators
};

// ILogger and ILoggerFinder up to TensorRT 10.
class Logger8 {
  public:
    virtual void log(int32_t severity, const char* message) noexcept = 0;
};
class LoggerFinder8 {
  public:
    virtual void* findLogger() = 0;
};

// In TensorRT 11 they are versioned interfaces, whose functions come first.
class Versioned11 {
  public:
    virtual void getAPILanguage() = 0;
    virtual void getInterfaceInfo() = 0;
    virtual void destructor() = 0;
    virtual void deleting_destructor() = 0;
};
class Logger11 : public Versioned11 {
  public:
    virtual void log(int32_t severity, const char* message) noexcept = 0;
};
class LoggerFinder11 : public Versioned11 {
  public:
    virtual void* findLogger() = 0;
};

}  // namespace internimage
