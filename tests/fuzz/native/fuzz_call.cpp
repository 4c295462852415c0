// Attributes, shapes, lengths and data of one operator call from fuzzer bytes, through the framework-free layer that the
// ONNX Runtime op calls: check() refuses it, or Layer::run() touches only what belongs to it. Every tensor is a heap block of
// exactly its size, so that AddressSanitizer sees a byte too far. Over a second of CPU is a fault, too.
// Seeds in tests/fuzz/corpus/call are read like any input.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <memory>
#include <new>

#include "gsrq/cpu/attention.hpp"
#include "gsrq/layout.h"

using namespace gsrq::cpu;

namespace {

constexpr int64_t kMostElements = 1 << 18;  // of one tensor: larger ones are refused by memory, not by us
constexpr double kMostWork = 3e7;           // of one call; see work()
constexpr double kMostSeconds = 1;

class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size) : data_(data), size_(size) {}
  uint8_t byte() { return at_ < size_ ? data_[at_++] : 0; }
  int64_t below(int64_t n) { return byte() % n; }
  int64_t word() {
    uint64_t out = 0;
    for (int i = 0; i < 8; ++i) out = out << 8 | byte();
    return static_cast<int64_t>(out);
  }
  float real() {
    const uint32_t bits = static_cast<uint32_t>(word());
    float out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
  }
  // An odd number: a power of two, give or take one, negative or not, or any.
  int64_t odd() {
    const uint8_t kind = byte();
    if (kind < 32) return word();
    const int64_t power = static_cast<int64_t>(uint64_t{1} << (kind % 64));
    return static_cast<int64_t>(static_cast<uint64_t>(power) + static_cast<uint64_t>(below(3) - 1));
  }

 private:
  const uint8_t* data_;
  size_t size_, at_ = 0;
};

// A heap block of exactly n bytes, filled with a repeated run of fuzzer bytes.
struct Block {
  Block(int64_t bytes, Bytes& in) : data(new uint8_t[static_cast<size_t>(bytes)]) {
    uint8_t run[16];
    const int kind = in.byte();
    for (uint8_t& b : run) b = kind % 4 ? in.byte() : static_cast<uint8_t>(kind);
    for (int64_t at = 0; at < bytes; at += 16) {
      std::memcpy(data.get() + at, run, static_cast<size_t>(std::min<int64_t>(16, bytes - at)));
      if (kind & 16) data[at] = static_cast<uint8_t>(data[at] ^ at / 16);
    }
  }
  std::unique_ptr<uint8_t[]> data;
};

[[maybe_unused]] int64_t elements(const Shape& shape) {
  int64_t out = 1;
  for (int64_t n : shape) {
    if (n < 0 || (n > 0 && out > kMostElements / n)) return -1;
    out *= n;
  }
  return out;
}

// Products and comparisons that a call's sizes ask for. One of much work takes long by right: none is run, so that a call
// which takes a second hangs.
[[maybe_unused]] double work(const Attributes& a, const Shapes& s) {
  const double batch = static_cast<double>(s.query[0]), steps = static_cast<double>(s.query[2]);
  const double coded = std::min(static_cast<double>(s.key_codes[1]), steps + static_cast<double>(s.key_exact[2]));
  const double tokens = static_cast<double>(s.key_codes[1] + s.key_exact[2]) + steps, beam = static_cast<double>(a.beam);
  double sum = batch * static_cast<double>(s.query[1]) * steps * tokens * static_cast<double>(2 * s.query[3]);
  for (const Shape* book : {&s.key_codebooks, &s.value_codebooks}) {
    const double groups = static_cast<double>((*book)[0]), stages = static_cast<double>((*book)[1]);
    const double width = static_cast<double>((*book)[3]);
    sum += groups * width * width * (width + 256 * stages);                                     // metric and norms
    sum += batch * coded * groups * stages * beam * (256 * (width + beam) + width * width);     // codes
    sum += batch * groups * stages * (static_cast<double>(s.query[1]) * (steps + tokens) * 256);  // tables, sums
  }
  return sum;
}

// The CPU time of the slowest input, and what holds each to the limit.
struct Stopwatch {
  ~Stopwatch() { std::fprintf(stderr, "slowest_cpu_s: %.3f\n", slowest); }
  void hold(double seconds) {
    slowest = std::max(slowest, seconds);
    if (seconds <= kMostSeconds) return;
    std::fprintf(stderr, "%.2f s of CPU for one input\n", seconds);
    std::abort();
  }
  double slowest = 0;
} stopwatch;

[[maybe_unused]] void parallel_for(void*, void (*fn)(void*, size_t), size_t total, void* argument) {
  for (size_t i = 0; i < total; ++i) fn(argument, i);
}

const Kernels* kernels(Bytes& in) {
#if defined(__x86_64__)
  static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  static const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vl") &&
                             __builtin_cpu_supports("avx512dq");
  const int64_t kind = in.below(3);
  if (kind == 2 && avx512) return &avx512_kernels;
  if (kind >= 1 && avx2) return &avx2_kernels;
#else
  in.byte();
#endif
  return &generic_kernels;
}

void run_input(const uint8_t* data, size_t size) {
  Bytes in(data, size);
  Attributes a;
  a.scale = 0.125f;
  a.sinks = in.below(5);
  a.window = in.below(9);
  const uint8_t order = in.byte();
  a.codes_by_head = order >= 192;
  a.block = (1 + order % 5) * (a.codes_by_head ? GSRQ_CODE_TILE : 1);
  a.beam = 1 + in.below(3);
  a.sliding_window = in.below(4) ? 0 : in.below(40);
  a.softcap = in.below(4) ? 0 : 30;
  const uint8_t flags = in.byte();
  a.rope_interleaved = flags & 1;
  a.exact_prefill = flags & 2;
  a.rotated_keys = flags & 128;
  [[maybe_unused]] const Kernels* table = kernels(in);
  [[maybe_unused]] const Element element = static_cast<Element>(in.below(3));

  // A sound call ...
  const int64_t batch = in.below(3), kv = 1 + in.below(3), queries = 1 + in.below(3), steps = in.below(8);
  const int64_t d = 2 * (1 + in.below(20)), half = in.below(d / 2 + 1);
  int64_t capacity = flags & 4 ? 64 + in.below(100) : in.below(24);
  if (a.codes_by_head) capacity = capacity / GSRQ_CODE_TILE * GSRQ_CODE_TILE;
  const auto width_of = [&](int64_t kind) { return kind == 0 ? d : kind == 1 ? kv * d : kind == 2 && d % 4 == 0 ? d / 2 : 1; };
  const int64_t kw = width_of(in.below(4)), vw = width_of(in.below(4));
  const int64_t ks = 1 + in.below(3), vs = 1 + in.below(3);
  const int64_t kg = kv * d / kw, vg = kv * d / vw, slots = gsrq_exact_slots(a.sinks, a.window, a.block);
  Shapes s;
  s.query = {batch, kv * queries, steps, d};
  s.key = s.value = {batch, kv, steps, d};
  s.cos = s.sin = {64 + in.below(128), half};
  s.past_lengths = s.new_lengths = {batch};
  s.key_codes = {batch, capacity, kg * ks};
  s.value_codes = {batch, capacity, vg * vs};
  s.key_exact = s.value_exact = {batch, kv, slots, d};
  s.key_codebooks = {kg, ks, GSRQ_CODEBOOK_SIZE, kw};
  s.value_codebooks = {vg, vs, GSRQ_CODEBOOK_SIZE, vw};
  s.key_transform = {kg, kw, kw};
  s.value_transform = {vg, vw, vw};

  if (a.rotated_keys || in.below(16) == 1) s.key_center = {kv * d};

  // ... some of it spoilt. Several dimensions get the same odd number, as a consistent attacker would write it.
  const auto shapes = in_order(s);
  int64_t* const numbers[] = {&a.sinks, &a.window, &a.block, &a.beam, &a.sliding_window};
  for (int64_t spoils = in.below(8); spoils > 0; --spoils) {
    const int64_t what = in.below(8), number = what == 7 ? in.below(64) : in.odd();
    if (what == 0) *numbers[in.below(5)] = number;
    if (what == 1) a.scale = in.real();
    if (what == 2) a.softcap = in.real();
    Shape& shape = *shapes[static_cast<size_t>(in.below(16))];
    if (what == 3 && !shape.empty()) shape.pop_back();
    if (what == 4) shape.push_back(number);
    if ((what >= 5 || what == 7) && !shape.empty()) {
      const int64_t old = shape[static_cast<size_t>(in.below(static_cast<int64_t>(shape.size())))];
      const bool everywhere = in.byte() & 1;
      for (Shape* other : shapes)
        for (int64_t& n : *other)
          if (n == old && (everywhere || other == &shape)) n = number;
    }
  }

  if (!check(a).empty() || !check(a, s).empty()) return;
#ifndef GSRQ_CHECK_ONLY
  for (const Shape* shape : shapes)
    if (elements(*shape) < 0) return;
  if (work(a, s) > kMostWork) return;

  const auto block = [&](const Shape& shape, int64_t bytes) { return Block(elements(shape) * bytes, in); };
  const int64_t wide = element_size(element);
  Block query = block(s.query, 4), key = block(s.key, 4), value = block(s.value, 4), cos = block(s.cos, 4),
        sin = block(s.sin, 4), key_codes = block(s.key_codes, 1), value_codes = block(s.value_codes, 1),
        key_exact = block(s.key_exact, wide), value_exact = block(s.value_exact, wide),
        key_words = block(s.key_codebooks, 2), value_words = block(s.value_codebooks, 2),
        key_transform = block(s.key_transform, 4), value_transform = block(s.value_transform, 4),
        key_center = block(a.rotated_keys ? s.key_center : Shape{0}, 4), output = block(s.query, 4),
        out_key_codes = block(s.key_codes, 1), out_value_codes = block(s.value_codes, 1),
        out_key_exact = block(s.key_exact, wide), out_value_exact = block(s.value_exact, wide);
  const size_t rows = static_cast<size_t>(s.query[0]);
  std::unique_ptr<int64_t[]> past(new int64_t[rows]), fresh(new int64_t[rows]);

  Call call = make_call(s, {query.data.get(), key.data.get(), value.data.get(), cos.data.get(), sin.data.get(), past.get(),
                            fresh.get(), key_codes.data.get(), value_codes.data.get(), key_exact.data.get(),
                            value_exact.data.get(), key_words.data.get(), value_words.data.get(),
                            key_transform.data.get(), value_transform.data.get(),
                             a.rotated_keys ? key_center.data.get() : nullptr});
  call.element = element;
  call.output = reinterpret_cast<float*>(output.data.get());
  const bool in_place = flags & 8;
  call.present_key_codes = in_place ? key_codes.data.get() : out_key_codes.data.get();
  call.present_value_codes = in_place ? value_codes.data.get() : out_value_codes.data.get();
  call.present_key_exact = in_place ? key_exact.data.get() : out_key_exact.data.get();
  call.present_value_exact = in_place ? value_exact.data.get() : out_value_exact.data.get();

  Layer layer(a, table, flags & 16, flags & 32);
  for (int run = 0; run < 2; ++run) {  // the second one with what the first derived from constant codebooks
    for (size_t b = 0; b < rows; ++b) {
      past[b] = in.below(8) ? in.byte() : in.odd();
      fresh[b] = in.below(8) ? in.below(8) : in.odd();
      if (flags & 64) fresh[b] = std::min<int64_t>(1, call.steps);
    }
    if (!check(a, call).empty()) continue;
    try {
      layer.run(call, {nullptr, parallel_for});
    } catch (const std::bad_alloc&) {
    }
  }
#endif
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::clock_t started = std::clock();
  run_input(data, size);
  stopwatch.hold(static_cast<double>(std::clock() - started) / CLOCKS_PER_SEC);
  return 0;
}
