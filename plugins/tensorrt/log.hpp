// Messages to TensorRT's logger, or to stderr where the host gave none.
#pragma once

#include <string>

namespace gsrq::trt {

void log_error(const std::string& message) noexcept;

// Runs fn, which returns what is wrong or nothing, and logs that or what it throws. Nothing throws into TensorRT.
template <class Fn>
bool succeeded(const char* method, const Fn& fn) noexcept;

}  // namespace gsrq::trt

#include <exception>
#include <new>

template <class Fn>
bool gsrq::trt::succeeded(const char* method, const Fn& fn) noexcept {
  try {
    const std::string problem = fn();
    if (problem.empty()) return true;
    log_error("GsrqAttention: " + std::string(method) + ": " + problem);
  } catch (const std::bad_alloc&) {
    log_error("GsrqAttention: out of memory");
  } catch (const std::exception& error) {
    log_error(error.what());
  }
  return false;
}
