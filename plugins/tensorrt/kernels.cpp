// The functions of gsrq_cuda.h that the plugin calls, passed on to libgsrq_cuda.so.
#include "kernels.hpp"

#include <dlfcn.h>

#include <cstdlib>
#include <cstring>

#include "gsrq/cuda/gsrq_cuda.h"

namespace gsrq::trt {
namespace {

#define GSRQ_FUNCTIONS(X) X(inspect) X(prepared_bytes) X(prepare) X(workspace_bytes) X(attention) X(error)

struct Kernels {
  std::string problem;
#define GSRQ_POINTER(name) decltype(&gsrq_cuda_##name) name = nullptr;
  GSRQ_FUNCTIONS(GSRQ_POINTER)
#undef GSRQ_POINTER
};

std::string library_path() {
  const char* named = std::getenv("GSRQ_CUDA_LIBRARY");
  if (named != nullptr && *named != '\0') return named;
  Dl_info self;
  if (dladdr(reinterpret_cast<const void*>(&load_kernels), &self) == 0 || self.dli_fname == nullptr) return "libgsrq_cuda.so";
  const std::string path = self.dli_fname;
  const size_t slash = path.rfind('/');
  return (slash == std::string::npos ? "" : path.substr(0, slash + 1)) + "libgsrq_cuda.so";
}

Kernels load() {
  Kernels found;
  const std::string path = library_path(), mend = "; put libgsrq_cuda.so beside the plugin or name it in GSRQ_CUDA_LIBRARY";
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    found.problem = "the kernels cannot be loaded: " + std::string(dlerror()) + mend;
    return found;
  }
  const auto abi = reinterpret_cast<decltype(&gsrq_cuda_abi)>(dlsym(library, "gsrq_cuda_abi"));
  if (abi == nullptr || abi() != GSRQ_CUDA_ABI) {
    found.problem = path + " has interface version " + (abi == nullptr ? "none" : std::to_string(abi())) +
                    ", this plugin needs " + std::to_string(GSRQ_CUDA_ABI) + mend;
    return found;
  }
#define GSRQ_LOOK_UP(name)                                                                      \
  found.name = reinterpret_cast<decltype(found.name)>(dlsym(library, "gsrq_cuda_" #name));      \
  if (found.name == nullptr) found.problem = path + " lacks gsrq_cuda_" #name + mend;
  GSRQ_FUNCTIONS(GSRQ_LOOK_UP)
#undef GSRQ_LOOK_UP
  return found;
}

const Kernels& kernels() {
  static const Kernels loaded = load();  // stays loaded: kernels may be in flight at exit
  return loaded;
}

}  // namespace

std::string load_kernels() { return kernels().problem; }

}  // namespace gsrq::trt

// Only called once load_kernels() has succeeded.
using gsrq::trt::kernels;

const char* gsrq_cuda_error(void) { return kernels().error(); }
int gsrq_cuda_inspect(gsrq_layer* layer, void* scratch, void* stream) { return kernels().inspect(layer, scratch, stream); }
int64_t gsrq_cuda_prepared_bytes(const gsrq_layer* layer) { return kernels().prepared_bytes(layer); }
int gsrq_cuda_prepare(const gsrq_layer* layer, void* prepared, void* stream) {
  return kernels().prepare(layer, prepared, stream);
}
int64_t gsrq_cuda_workspace_bytes(const gsrq_layer* layer, const gsrq_call* call) {
  return kernels().workspace_bytes(layer, call);
}
int gsrq_cuda_attention(const gsrq_layer* layer, const gsrq_call* call, const void* prepared, void* workspace,
                        int64_t workspace_bytes, void* stream) {
  return kernels().attention(layer, call, prepared, workspace, workspace_bytes, stream);
}
