// SPDX-License-Identifier: Apache-2.0
#include "plugin_log.h"

#include <dlfcn.h>

#include <atomic>

#include "plugin_registration.h"
#include "register/tensorrt_layout.h"

namespace internimage {
namespace {

#if PLUGIN_HAS_LOGGER_FINDER
// The TensorRT that loaded this library; it need not be of the headers' version.
std::atomic<void*> g_finder{nullptr};
std::atomic<void* (*)()> g_get_logger{nullptr};
std::atomic<int32_t> g_major{NV_TENSORRT_MAJOR};

// TensorRT's getLogger() and version, of the very library that `finder` comes from; nothing of TensorRT is linked.
void ask_library_of(void* finder) {
    Dl_info info{};
    const void* vtable = *static_cast<const void* const*>(finder);
    if (dladdr(vtable, &info) == 0 || info.dli_fname == nullptr) return;
    void* library = dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    if (library == nullptr) return;
    g_get_logger.store(reinterpret_cast<void* (*)()>(dlsym(library, "getLogger")));
    auto* get_version = reinterpret_cast<int32_t (*)()>(dlsym(library, "getInferLibVersion"));
    const int32_t version = get_version != nullptr ? get_version() : 0;  // 8601 is 8.6.1, 101601 is 10.16.1
    if (version > 0) g_major.store(version < 10000 ? version / 1000 : version / 10000);
    dlclose(library);  // the library stays: it is the one that called
}

// The objects are TensorRT's, of classes that are laid out like these and are not these; the sanitizer would tell.
#define OF_ANOTHER_CLASS __attribute__((no_sanitize("vptr")))

OF_ANOTHER_CLASS void* find_logger(void* finder, bool versioned) {
    if (versioned) return static_cast<LoggerFinder11*>(finder)->findLogger();
    return static_cast<LoggerFinder8*>(finder)->findLogger();
}

OF_ANOTHER_CLASS void log_to_tensorrt(const char* message) {
    constexpr auto kError = static_cast<int32_t>(nvinfer1::ILogger::Severity::kERROR);
    const int32_t major = g_major.load();
    if (major < 8 || major > 11) return;  // its classes are unknown
    void* finder = g_finder.load();
    void* logger = finder != nullptr ? find_logger(finder, major == 11) : nullptr;
    // The finder knows the logger of engines only; while a parser creates plugins there is none yet.
    auto* get_logger = g_get_logger.load();
    if (logger == nullptr && get_logger != nullptr) logger = get_logger();
    if (logger == nullptr) return;
    if (major == 11) {
        static_cast<Logger11*>(logger)->log(kError, message);
    } else {
        static_cast<Logger8*>(logger)->log(kError, message);
    }
}
#endif

}  // namespace

void log_error(const std::string& message) noexcept {
#if PLUGIN_HAS_LOGGER_FINDER
    try {
        log_to_tensorrt(message.c_str());
    } catch (...) {
    }
#else
    static_cast<void>(message);
#endif
}

}  // namespace internimage

#if PLUGIN_HAS_LOGGER_FINDER
extern "C" PLUGIN_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
    internimage::g_get_logger.store(nullptr);
    if (finder != nullptr) internimage::ask_library_of(finder);
    internimage::g_finder.store(finder);
}
#endif
