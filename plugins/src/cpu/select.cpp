#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "gsrq/cpu/kernels.hpp"

namespace gsrq::cpu {

#if defined(__x86_64__)
// clang 14 does not know __builtin_cpu_supports("f16c").
static bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}
#endif

const Kernels* select_kernels(const char** problem) {
  const char* asked = std::getenv("GSRQ_CPU_ISA");
  if (asked != nullptr && *asked == '\0') asked = nullptr;
  if (asked != nullptr && std::strcmp(asked, "generic") == 0) return &generic_kernels;
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512vnni");
  const Kernels* best = avx512 ? &avx512_kernels : avx2 ? &avx2_kernels : &generic_kernels;
  if (asked == nullptr) return best;
  if (std::strcmp(asked, "avx2") == 0 && avx2) return &avx2_kernels;
  if (std::strcmp(asked, "avx512") == 0 && avx512) return &avx512_kernels;
  const bool known = std::strcmp(asked, "avx2") == 0 || std::strcmp(asked, "avx512") == 0;
  *problem = known ? "GSRQ_CPU_ISA names an instruction set that this processor lacks"
                   : "GSRQ_CPU_ISA must be generic, avx2 or avx512";
  return nullptr;
#else
  if (asked == nullptr) return &generic_kernels;
  *problem = "GSRQ_CPU_ISA must be generic on this processor";
  return nullptr;
#endif
}

}  // namespace gsrq::cpu
