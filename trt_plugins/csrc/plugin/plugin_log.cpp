// SPDX-License-Identifier: Apache-2.0
#include "plugin_log.h"

#include <dlfcn.h>

#include <atomic>

#include "plugin_registration.h"

namespace internimage {
namespace {

#if PLUGIN_HAS_LOGGER_FINDER
using GetLogger = nvinfer1::ILogger* (*)();

std::atomic<nvinfer1::ILoggerFinder*> g_finder{nullptr};
std::atomic<GetLogger> g_get_logger{nullptr};

// TensorRT's getLogger(), in the very library that `finder` comes from; nothing of TensorRT is linked.
GetLogger find_get_logger(nvinfer1::ILoggerFinder* finder) {
    Dl_info info{};
    const void* vtable = *reinterpret_cast<const void* const*>(finder);
    if (dladdr(vtable, &info) == 0 || info.dli_fname == nullptr) return nullptr;
    void* library = dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    if (library == nullptr) return nullptr;
    void* function = dlsym(library, "getLogger");
    dlclose(library);  // the library stays: it is the one that called
    return reinterpret_cast<GetLogger>(function);
}
#endif

}  // namespace

void log_error(const std::string& message) noexcept {
#if PLUGIN_HAS_LOGGER_FINDER
    try {
        nvinfer1::ILoggerFinder* finder = g_finder.load();
        nvinfer1::ILogger* logger = finder != nullptr ? finder->findLogger() : nullptr;
        // The finder knows the logger of engines only; while a parser creates plugins there is none yet.
        const GetLogger get_logger = g_get_logger.load();
        if (logger == nullptr && get_logger != nullptr) logger = get_logger();
        if (logger != nullptr) logger->log(nvinfer1::ILogger::Severity::kERROR, message.c_str());
    } catch (...) {
    }
#else
    static_cast<void>(message);
#endif
}

}  // namespace internimage

#if PLUGIN_HAS_LOGGER_FINDER
extern "C" PLUGIN_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
    internimage::g_get_logger.store(finder != nullptr ? internimage::find_get_logger(finder) : nullptr);
    internimage::g_finder.store(finder);
}
#endif
