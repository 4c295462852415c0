// All CPU kernels, compiled once for each instruction set (GSRQ_ISA names it). No standard library templates and no
// inline functions with external linkage here: the linker could let one instruction set's copy serve another.
#include <cmath>
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "gsrq/cpu/kernels.hpp"
#include "gsrq/layout.h"

namespace gsrq::cpu::GSRQ_ISA {
#include "gsrq/cpu/simd.hpp"
// (order matters: each file uses the ones before it)
#include "gsrq/cpu/gemm.hpp"
#include "gsrq/cpu/prepare.hpp"
#include "gsrq/cpu/score.hpp"
#include "gsrq/cpu/lookup.hpp"
#include "gsrq/cpu/values.hpp"
#include "gsrq/cpu/attend.hpp"
#include "gsrq/cpu/encode.hpp"
}  // namespace gsrq::cpu::GSRQ_ISA

#define GSRQ_CONCAT2(a, b) a##b
#define GSRQ_CONCAT(a, b) GSRQ_CONCAT2(a, b)
#define GSRQ_STRING2(a) #a
#define GSRQ_STRING(a) GSRQ_STRING2(a)

namespace gsrq::cpu {
const Kernels GSRQ_CONCAT(GSRQ_ISA, _kernels) = {
    GSRQ_STRING(GSRQ_ISA), GSRQ_ISA::prepare_keys, GSRQ_ISA::score,  GSRQ_ISA::build_table, GSRQ_ISA::lookup,
    GSRQ_ISA::values,      GSRQ_ISA::attend,       GSRQ_ISA::encode, GSRQ_ISA::norms,       GSRQ_ISA::narrow,
    GSRQ_ISA::widen,
};
}  // namespace gsrq::cpu
