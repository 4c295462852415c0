// The operator ai.gsrq::GsrqAttention v1 on a CPU, without any framework. docs/operator.md has the semantics; names
// and shapes here are its. A host fills a Call, asks check() what is wrong with it, and runs it on a Layer.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "gsrq/cpu/kernels.hpp"

namespace gsrq::cpu {

struct Attributes {
  float scale = 0, softcap = 0;
  int64_t sinks = 0, window = 0, block = 0, beam = 1, sliding_window = 0;
  bool rope_interleaved = false, exact_prefill = false;
  bool rotated_keys = false;   // keys are coded after RoPE
  bool codes_by_head = false;  // how stored codes are ordered, gsrq/layout.h
};

using Shape = std::vector<int64_t>;

struct Shapes {  // of the inputs, in the operator's order; key_center is empty where the input is not given
  Shape query, key, value, cos, sin, past_lengths, new_lengths, key_codes, value_codes, key_exact, value_exact,
      key_codebooks, value_codebooks, key_transform, value_transform, key_center;
};

// The operator's inputs in its order, the optional one last.
constexpr size_t kOperatorInputs = 16;
using Inputs = std::array<const void*, kOperatorInputs>;
inline std::array<Shape*, kOperatorInputs> in_order(Shapes& s) {
  return {&s.query,         &s.key,          &s.value,           &s.cos,           &s.sin,
          &s.past_lengths,  &s.new_lengths,  &s.key_codes,       &s.value_codes,   &s.key_exact,
          &s.value_exact,   &s.key_codebooks, &s.value_codebooks, &s.key_transform, &s.value_transform,
          &s.key_center};
}

struct Call {
  int64_t batch, heads, steps, head_dim, kv_heads, positions, half_rope, capacity;
  const float *query, *key, *value, *cos, *sin;
  const int64_t *past_lengths, *new_lengths;
  const uint8_t *key_codes, *value_codes;
  const void *key_exact, *value_exact;
  Element element;
  Words key_words, value_words;
  const float *key_transform, *value_transform;
  const float* key_center;  // null unless rotated_keys
  float* output;
  uint8_t *present_key_codes, *present_value_codes;
  void *present_key_exact, *present_value_exact;
};

// A call of shapes that passed check(): all but element and the outputs, which are the host's to fill in.
Call make_call(const Shapes& shapes, const Inputs& inputs);

// Runs fn(argument, i) for all i < total, on any threads, and returns when all are done.
struct Threads {
  void* host;
  void (*parallel_for)(void* host, void (*fn)(void*, size_t), size_t total, void* argument);
};

// Empty, or what is wrong with the attributes, shapes or lengths. Nothing is written.
std::string check(const Attributes& attributes);
std::string check(const Attributes& attributes, const Shapes& shapes);
std::string check(const Attributes& attributes, const Call& call);

struct AlignedBuffer {  // 64-byte aligned memory that grows; throws std::bad_alloc
  ~AlignedBuffer();
  void* reserve(size_t bytes);
  void* data = nullptr;
  size_t size = 0;
};

// One node's state: the attributes and what is derived from constant codebooks, on first use.
class Layer {
 public:
  // constant_*: the codebooks and transforms never change between calls, so derived forms may be kept.
  Layer(const Attributes& attributes, const Kernels* kernels, bool constant_keys, bool constant_values);

  // The call must have passed check(). Throws std::bad_alloc.
  void run(const Call& call, const Threads& threads);

 private:
  struct Metric {  // of one side: A^T A (empty for the identity) and c^T A^T A c of every codeword
    std::once_flag once;
    std::vector<double> matrix, norms;
  };
  struct KeyState {
    AlignedBuffer words;
    std::vector<int32_t> multipliers, bias;
    std::vector<float> unit;
    AlignedBuffer panels;       // rotated frame: codewords in TableTask's order, of every head and stage
    std::vector<float> center;  // rotated frame: of every head in LookupTask's order
    int64_t half_rope = -1;
  };
  struct Side;
  struct DecodePlan;

  void build_metric(Metric& metric, const Words& words, const float* transform, const Threads& threads) const;
  const KeyState* key_state(const Call& call, const Threads& threads);
  void prepare_panels(const Call& call, KeyState& state, const Threads& threads) const;
  KeySlices key_slices(const KeyState& state, const Call& call, int64_t kv_head) const;
  void encode(const Call& call, const void* new_keys, const void* new_values, const Threads& threads);
  void attend(const Call& call, const std::vector<int64_t>& rows, const void* new_keys, const void* new_values,
              const Threads& threads) const;
  void decode(const Call& call, const KeyState& state, const std::vector<int64_t>& rows, const void* new_keys,
              const void* new_values, const Threads& threads) const;
  AttendTask attend_task(const Call& call, int64_t row, int64_t kv_head, const void* new_keys,
                         const void* new_values) const;
  void write_ring(const Call& call, const void* new_keys, const void* new_values) const;

  const Attributes attributes_;
  const Kernels* const kernels_;
  const bool constant_keys_, constant_values_;
  Metric key_metric_, value_metric_;
  std::mutex key_mutex_;
  std::unique_ptr<KeyState> key_state_;
};

}  // namespace gsrq::cpu
