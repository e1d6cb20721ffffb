// SPDX-License-Identifier: Apache-2.0
// libinternimage_trt_register.so: opening it registers the plugin library that lies beside it.
//
// Triton, DeepStream and others only open a plugin library, for TensorRT's own register themselves then. A library for
// IPluginRegistry::loadLibrary() must not do that, so this one calls loadLibrary() when it is opened. It is compiled
// without TensorRT's headers and serves 8.5 to 11. TensorRT-RTX takes no plugins.
#include <dlfcn.h>

#include <climits>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "tensorrt_layout.h"

namespace {

using internimage::Registry10;
using internimage::Registry11;
using internimage::Registry8;

constexpr const char* kPluginLibrary = "libinternimage_trt_plugins.so";
constexpr const char* kPluginVariable = "INTERNIMAGE_DEPLOY_PLUGIN";
constexpr int32_t kOldest = 8;
constexpr int32_t kNewest = 11;

struct Version {
    int32_t major;
    int32_t minor;
    int32_t patch;
};

struct Plugin {
    char path[PATH_MAX];
    void* handle;
    Version built;      // of the headers
    int32_t interface;  // 2 or 3, the number in IPluginV2 and IPluginV3
};

// One line on the standard error stream: there is no TensorRT logger yet.
void complain(const char* subject, const char* problem) {
    fprintf(stderr, "internimage-deploy: the plugins are not registered with TensorRT: %s%s\n", subject, problem);
}

template <typename Function>
Function* symbol(void* library, const char* name) {
    return reinterpret_cast<Function*>(dlsym(library, name));
}

// What $INTERNIMAGE_DEPLOY_PLUGIN names, else the neighbour of this library.
bool find_plugin(char (&path)[PATH_MAX]) {
    const char* named = getenv(kPluginVariable);
    int length = 0;
    if (named != nullptr && *named != '\0') {
        length = snprintf(path, sizeof(path), "%s", named);
    } else {
        Dl_info self{};
        if (dladdr(reinterpret_cast<const void*>(&complain), &self) == 0 || self.dli_fname == nullptr) return false;
        const char* slash = strrchr(self.dli_fname, '/');
        const char* folder = slash != nullptr ? self.dli_fname : ".";
        const int folder_length = slash != nullptr ? static_cast<int>(slash - self.dli_fname) : 1;
        length = snprintf(path, sizeof(path), "%.*s/%s", folder_length, folder, kPluginLibrary);
    }
    return length > 0 && length < static_cast<int>(sizeof(path));
}

bool open_plugin(Plugin& plugin) {
    if (!find_plugin(plugin.path)) {
        complain(kPluginLibrary, ": its path is too long");
        return false;
    }
    plugin.handle = dlopen(plugin.path, RTLD_LAZY);
    if (plugin.handle == nullptr) {
        complain("", dlerror());
        return false;
    }
    auto* built_for = symbol<const char*()>(plugin.handle, "internimage_plugin_built_for");
    Version& built = plugin.built;
    if (built_for != nullptr &&
        sscanf(built_for(), "%d.%d.%d v%d", &built.major, &built.minor, &built.patch, &plugin.interface) == 4) {
        return true;
    }
    complain(plugin.path, " is no plugin library of this version of internimage-deploy");
    return false;
}

// 8601 is 8.6.1, 101601 is 10.16.1.
Version version_of(void* tensorrt) {
    auto* get = symbol<int32_t()>(tensorrt, "getInferLibVersion");
    const int32_t number = get != nullptr ? get() : 0;
    if (number < 10000) return {number / 1000, number / 100 % 10, number % 100};
    return {number / 10000, number / 100 % 100, number % 100};
}

// Whether the plugin's classes are those of this TensorRT. trt_plugins/toolchain.py has the same rule.
bool has_the_classes_of(const Plugin& plugin, const Version& tensorrt) {
    if (plugin.built.major != tensorrt.major) {
        return plugin.interface == 3 && plugin.built.major >= 10 && tensorrt.major >= 10;
    }
    return tensorrt.major != 8 || plugin.built.minor == tensorrt.minor;
}

// Whether the registry holds the plugin library's creators already.
template <typename Registry>
bool has_creators(const Registry& registry, const Plugin& plugin) {
    auto* creators = symbol<void* const*(int32_t&)>(plugin.handle, Registry::kCreators);
    int32_t count = 0;
    if (creators == nullptr) return false;
    void* const first = creators(count)[0];
    void* const* registered = registry.list(&count);
    for (int32_t i = 0; registered != nullptr && i < count; ++i) {
        if (registered[i] == first) return true;
    }
    return false;
}

template <typename Registry>
bool load(void* registry, const Plugin& plugin) {
    auto* known = static_cast<Registry*>(registry);
    // Twice would be an error in TensorRT's log.
    return has_creators(*known, plugin) || known->loadLibrary(plugin.path) != nullptr;
}

// 8.5 has no loadLibrary(), and 8.6.0, an early access release, has it elsewhere in the class. There the creators are
// registered one by one, and the plugins have no logger.
bool loads_libraries(const Version& tensorrt) {
    return tensorrt.major > 8 || (tensorrt.minor == 6 && tensorrt.patch > 0);
}

bool register_each(Registry8* registry, const Plugin& plugin) {
    if (has_creators(*registry, plugin)) return true;
    auto* creators = symbol<void* const*(int32_t&)>(plugin.handle, Registry8::kCreators);
    int32_t count = 0;
    void* const* list = creators != nullptr ? creators(count) : nullptr;
    bool registered = count > 0;
    for (int32_t i = 0; i < count; ++i) registered = registry->registerCreator(list[i], "") && registered;
    return registered;
}

void register_with(void* tensorrt, const char* name, const Plugin& plugin) {
    const Version version = version_of(tensorrt);
    if (!has_the_classes_of(plugin, version)) {
        char problem[160];
        snprintf(problem, sizeof(problem), " was built with the headers of TensorRT %d.%d, and %s is %d.%d",
                 plugin.built.major, plugin.built.minor, name, version.major, version.minor);
        complain(plugin.path, problem);
        return;
    }
    auto* get = symbol<void*()>(tensorrt, "getPluginRegistry");
    void* registry = get != nullptr ? get() : nullptr;
    bool registered = false;
    if (registry == nullptr) {
        complain(name, " has no plugin registry");
        return;
    }
    if (!loads_libraries(version)) {
        registered = register_each(static_cast<Registry8*>(registry), plugin);
    } else if (version.major < 10) {
        registered = load<Registry8>(registry, plugin);
    } else if (version.major == 10) {
        registered = load<Registry10>(registry, plugin);
    } else if (version.major == 11) {
        registered = load<Registry11>(registry, plugin);
    }
    if (!registered) complain(plugin.path, ": TensorRT did not take it");
}

// Calls `use` with each of TensorRT's libraries that dlopen() finds with `flags`; whether there was one.
bool use_tensorrt(const Plugin& plugin, int flags, bool all) {
    constexpr const char* kPatterns[] = {"libnvinfer.so.%d", "libnvinfer_lean.so.%d"};
    bool found = false;
    const auto use = [&](const char* name) {
        void* tensorrt = dlopen(name, RTLD_LAZY | flags);
        if (tensorrt == nullptr) return false;
        register_with(tensorrt, name, plugin);
        found = true;
        return !all;
    };
    for (const char* pattern : kPatterns) {
        // The headers' own version first: where nothing is loaded yet, that is the likely one.
        for (int32_t i = 0; i <= kNewest - kOldest; ++i) {
            const int32_t major = kOldest + (plugin.built.major - kOldest + i) % (kNewest - kOldest + 1);
            char name[32];
            snprintf(name, sizeof(name), pattern, major);
            if (use(name)) return true;
        }
    }
    return found;
}

// Static objects of the host are not made yet where this library is preloaded; nothing here needs them.
__attribute__((constructor)) void register_plugins() {
    static Plugin plugin{};
    if (!open_plugin(plugin)) return;
    if (use_tensorrt(plugin, RTLD_NOLOAD, true) || use_tensorrt(plugin, 0, false)) return;
    complain("", "no libnvinfer.so was found; add its folder to LD_LIBRARY_PATH");
}

}  // namespace
