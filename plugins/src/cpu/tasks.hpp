// Helpers of the files that cut a call into tasks.
#pragma once

#include <algorithm>
#include <exception>

#include "gsrq/cpu/attention.hpp"
#include "gsrq/layout.h"

namespace gsrq::cpu {

constexpr int64_t kFastTokens = 64;   // coded tokens from which decode.cpp beats tile-wise decoding
constexpr int64_t kAttendRows = 256;  // rows (queries x query heads of a KV head) of a tile of attention

struct CodedRange {  // coded tokens that a row's last new token sees
  int64_t first, count;
};

inline CodedRange coded_range(const Attributes& a, const Call& call, int64_t row) {
  const int64_t total = call.past_lengths[row] + call.new_lengths[row];
  const int64_t first = a.sliding_window > 0 ? std::max(a.sinks, total - a.sliding_window) : a.sinks;
  const int64_t end = a.sinks + gsrq_coded(total, a.sinks, a.window, a.block);
  return {first, std::max<int64_t>(0, end - first)};
}

// The codes of one side of a batch row's cache, in either order.
struct StoredCodes {
  int64_t stages, row_bytes, run, start;  // start: of the batch row in the tensor

  StoredCodes(const Attributes& a, const Call& call, const Words& words, int64_t batch_row)
      : stages(words.stages),
        row_bytes(words.groups * words.stages),
        run(gsrq_code_run(a.codes_by_head, words.groups, words.stages, words.width, call.head_dim)),
        start(batch_row * call.capacity * row_bytes) {}

  // Where row 0's code of a sub-vector's stage lies in the tensor.
  int64_t at(int64_t group, int64_t stage) const {
    return start + gsrq_code_offset(0, gsrq_code_byte(group, stage, stages), row_bytes, run);
  }
  CodeRows rows(int64_t first) const { return {first, run, GSRQ_CODE_TILE * (row_bytes - run)}; }
};

// Memory of the running thread, kept until the thread ends; floats, 64-byte aligned.
inline float* task_scratch(size_t floats) {
  thread_local AlignedBuffer buffer;
  return static_cast<float*>(buffer.reserve(floats * sizeof(float)));
}

// The calling thread's memory for what a call's tasks share; distinct from task_scratch.
inline float* call_scratch(size_t floats) {
  thread_local AlignedBuffer buffer;
  return static_cast<float*>(buffer.reserve(floats * sizeof(float)));
}

// fn(i) for i < total on the host's threads. An exception of a task is thrown again here.
template <class Fn>
void for_each_task(const Threads& threads, size_t total, const Fn& fn) {
  struct Shared {
    const Fn* fn;
    std::exception_ptr error;
    std::atomic<bool> failed{false};
  } shared{&fn, nullptr};
  if (total == 0) return;
  const auto one = [](void* argument, size_t i) {
    Shared& s = *static_cast<Shared*>(argument);
    try {
      (*s.fn)(i);
    } catch (...) {
      if (!s.failed.exchange(true)) s.error = std::current_exception();
    }
  };
  threads.parallel_for(threads.host, one, total, &shared);
  if (shared.failed) std::rethrow_exception(shared.error);
}

}  // namespace gsrq::cpu
