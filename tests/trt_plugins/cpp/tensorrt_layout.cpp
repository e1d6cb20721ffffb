// SPDX-License-Identifier: Apache-2.0
// Compares csrc/register/tensorrt_layout.h with the headers it is compiled with: the slots of the functions that are
// called. Prints the first difference and fails; compiled once for each TensorRT.
#include "register/tensorrt_layout.h"

#include <NvInferRuntime.h>
#include <NvInferVersion.h>

#include <cstdint>
#include <cstdio>
#include <cstring>

namespace {

using namespace nvinfer1;

// A pointer to a virtual function holds its offset in the class's table (the C++ ABI of GCC and Clang).
template <typename Class, typename Result, typename... Arguments>
intptr_t slot(Result (Class::*function)(Arguments...)) {
    intptr_t words[2];
    static_assert(sizeof(function) == sizeof(words), "another C++ ABI");
    memcpy(words, &function, sizeof(words));
    return words[0];
}

template <typename Class, typename Result, typename... Arguments>
intptr_t slot(Result (Class::*function)(Arguments...) const) {
    return slot(reinterpret_cast<Result (Class::*)(Arguments...)>(function));
}

int compare(const char* name, intptr_t ours, intptr_t theirs) {
    if (ours == theirs) return 0;
    printf("%s is at %ld, and tensorrt_layout.h has it at %ld\n", name, static_cast<long>(theirs),
           static_cast<long>(ours));
    return 1;
}

}  // namespace

int main() {
#if NV_TENSORRT_MAJOR < 10
    using Ours = internimage::Registry8;
    int wrong = compare("IPluginRegistry::getPluginCreatorList", slot(&Ours::list),
                        slot(&IPluginRegistry::getPluginCreatorList));
    wrong += compare("IPluginRegistry::registerCreator", slot(&Ours::registerCreator),
                     slot(&IPluginRegistry::registerCreator));
#else
#if NV_TENSORRT_MAJOR == 10
    using Ours = internimage::Registry10;
#else
    using Ours = internimage::Registry11;
#endif
    int wrong = compare("IPluginRegistry::getAllCreators", slot(&Ours::list), slot(&IPluginRegistry::getAllCreators));
#endif
#if NV_TENSORRT_MAJOR < 11
    using Logger = internimage::Logger8;
#else
    using Logger = internimage::Logger11;
#endif
    wrong += compare("ILogger::log", slot(&Logger::log), slot(&ILogger::log));
#if NV_TENSORRT_MAJOR > 8 || NV_TENSORRT_MINOR >= 6
#if NV_TENSORRT_MAJOR < 11
    using Finder = internimage::LoggerFinder8;
#else
    using Finder = internimage::LoggerFinder11;
#endif
    wrong += compare("ILoggerFinder::findLogger", slot(&Finder::findLogger), slot(&ILoggerFinder::findLogger));
#if NV_TENSORRT_MAJOR > 8 || NV_TENSORRT_PATCH > 0
    wrong += compare("IPluginRegistry::loadLibrary", slot(&Ours::loadLibrary), slot(&IPluginRegistry::loadLibrary));
#endif
#endif
    return wrong;
}
