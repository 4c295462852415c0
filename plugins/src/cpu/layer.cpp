// A call from start to end: encode what leaves the window, attend, write the ring. Work is cut into tasks by shapes
// and lengths only, and combined in a fixed order, so the result has the same bits for any number of threads.
#include <cstdlib>
#include <cstring>
#include <new>

#include "gsrq/cpu/attention.hpp"
#include "gsrq/layout.h"
#include "tasks.hpp"

namespace gsrq::cpu {

AlignedBuffer::~AlignedBuffer() { std::free(data); }

void* AlignedBuffer::reserve(size_t bytes) {
  if (bytes > size) {
    std::free(data);
    data = nullptr;
    size = 0;
    const size_t rounded = (bytes + 63) / 64 * 64;
    data = std::aligned_alloc(64, rounded);
    if (data == nullptr) throw std::bad_alloc();
    size = rounded;
  }
  return data;
}

Layer::Layer(const Attributes& attributes, const Kernels* kernels, bool constant_keys, bool constant_values)
    : attributes_(attributes),
      kernels_(kernels),
      constant_keys_(constant_keys),
      constant_values_(constant_values) {}

void Layer::run(const Call& call, const Threads& threads) {
  const int64_t slots = gsrq_exact_slots(attributes_.sinks, attributes_.window, attributes_.block);
  const size_t exact = static_cast<size_t>(call.batch * call.kv_heads * slots * call.head_dim) *
                       static_cast<size_t>(element_size(call.element));
  const auto copy = [](void* to, const void* from, size_t bytes) {
    if (to != from && bytes > 0) std::memcpy(to, from, bytes);
  };

  // What the cache stores is what attention sees: new tokens are rounded to its precision first.
  const int64_t fresh = call.batch * call.kv_heads * call.steps * call.head_dim;
  const void *new_keys = call.key, *new_values = call.value;
  AlignedBuffer rounded;
  if (call.element != Element::f32) {
    uint16_t* both = static_cast<uint16_t*>(rounded.reserve(static_cast<size_t>(4 * fresh) + 64));
    kernels_->narrow(call.key, both, fresh, call.element);
    kernels_->narrow(call.value, both + fresh, fresh, call.element);
    new_keys = both;
    new_values = both + fresh;
  }

  const int64_t codes = call.batch * call.capacity;
  copy(call.present_key_codes, call.key_codes,
       static_cast<size_t>(codes * call.key_words.groups * call.key_words.stages));
  copy(call.present_value_codes, call.value_codes,
       static_cast<size_t>(codes * call.value_words.groups * call.value_words.stages));
  encode(call, new_keys, new_values, threads);

  std::vector<int64_t> single, other;
  const KeyState* state = nullptr;
  for (int64_t b = 0; b < call.batch; ++b) {
    const int64_t n = call.new_lengths[b];
    float* row = call.output + b * call.steps * call.heads * call.head_dim;
    std::memset(row + n * call.heads * call.head_dim, 0,
                static_cast<size_t>((call.steps - n) * call.heads * call.head_dim) * sizeof(float));
    if (n == 0) continue;
    const bool fast = n == 1 && constant_keys_ && call.key_words.width % call.head_dim == 0 &&
                      coded_range(attributes_, call, b).count >= kFastTokens;
    (fast ? single : other).push_back(b);
  }
  if (!single.empty()) {
    state = key_state(call, threads);
    decode(call, *state, single, new_keys, new_values, threads);
  }
  if (!other.empty()) attend(call, other, new_keys, new_values, threads);

  // Last, so that the queries saw the tokens which the new ones replace.
  copy(call.present_key_exact, call.key_exact, exact);
  copy(call.present_value_exact, call.value_exact, exact);
  write_ring(call, new_keys, new_values);
}

void Layer::write_ring(const Call& call, const void* new_keys, const void* new_values) const {
  const Attributes& a = attributes_;
  const int64_t ring = a.window + a.block, slots = gsrq_exact_slots(a.sinks, a.window, a.block);
  const int64_t bytes = call.head_dim * element_size(call.element);
  for (int64_t b = 0; b < call.batch; ++b) {
    const int64_t total = call.past_lengths[b] + call.new_lengths[b];
    for (int64_t i = 0; i < call.new_lengths[b]; ++i) {
      const int64_t token = call.past_lengths[b] + i;
      if (token >= a.sinks && token + ring < total) continue;  // a later token takes the slot
      const int64_t slot = gsrq_slot(token, a.sinks, a.window, a.block);
      for (int64_t h = 0; h < call.kv_heads; ++h) {
        const int64_t row = b * call.kv_heads + h;
        const int64_t to = (row * slots + slot) * bytes, from = (row * call.steps + i) * bytes;
        std::memcpy(static_cast<char*>(call.present_key_exact) + to, static_cast<const char*>(new_keys) + from,
                    static_cast<size_t>(bytes));
        std::memcpy(static_cast<char*>(call.present_value_exact) + to, static_cast<const char*>(new_values) + from,
                    static_cast<size_t>(bytes));
      }
    }
  }
}

AttendTask Layer::attend_task(const Call& call, int64_t row, int64_t kv_head, const void* new_keys,
                              const void* new_values) const {
  const Attributes& a = attributes_;
  const int64_t bytes = call.head_dim * element_size(call.element), at = row * call.kv_heads + kv_head;
  const int64_t slots = gsrq_exact_slots(a.sinks, a.window, a.block), queries = call.heads / call.kv_heads;
  AttendTask task{};
  task.rope = {call.cos, call.sin, call.half_rope, a.rope_interleaved};
  task.key_words = call.key_words;
  task.value_words = call.value_words;
  const StoredCodes keys(a, call, call.key_words, row), values(a, call, call.value_words, row);
  task.key_codes = call.present_key_codes + keys.at(kv_head * call.head_dim / call.key_words.width, 0);
  task.value_codes = call.present_value_codes + values.at(kv_head * call.head_dim / call.value_words.width, 0);
  task.key_rows = keys.rows(0);
  task.value_rows = values.rows(0);
  task.kv_head = kv_head;
  task.head_dim = call.head_dim;
  task.queries = queries;
  task.query = call.query + (row * call.heads + kv_head * queries) * call.steps * call.head_dim;
  task.query_stride = call.steps * call.head_dim;
  task.count = 1;
  task.past = task.first_position = call.past_lengths[row];
  task.sinks = a.sinks;
  task.window = a.window;
  task.block = a.block;
  task.sliding_window = a.sliding_window;
  task.coded_after = gsrq_coded(call.past_lengths[row] + call.new_lengths[row], a.sinks, a.window, a.block);
  task.exact_prefill = a.exact_prefill;
  task.attend_coded = true;
  task.scale = a.scale;
  task.softcap = a.softcap;
  task.element = call.element;
  task.key_past = static_cast<const unsigned char*>(call.key_exact) + at * slots * bytes;
  task.key_center = a.rotated_keys ? call.key_center + kv_head * call.head_dim : nullptr;
  task.value_past = static_cast<const unsigned char*>(call.value_exact) + at * slots * bytes;
  task.key_new = static_cast<const unsigned char*>(new_keys) + at * call.steps * bytes;
  task.value_new = static_cast<const unsigned char*>(new_values) + at * call.steps * bytes;
  return task;
}

void Layer::attend(const Call& call, const std::vector<int64_t>& rows, const void* new_keys, const void* new_values,
                   const Threads& threads) const {
  const int64_t queries = call.heads / call.kv_heads, d = call.head_dim, padded = round_up(d, kLanes);
  const int64_t tile = queries >= kAttendRows ? 1 : kAttendRows / queries;
  struct Part {
    int64_t row, kv_head, first, count;
  };
  std::vector<Part> parts;
  for (int64_t b : rows)
    for (int64_t first = 0; first < call.new_lengths[b]; first += tile)
      for (int64_t h = 0; h < call.kv_heads; ++h)
        parts.push_back({b, h, first, std::min(tile, call.new_lengths[b] - first)});
  for_each_task(threads, parts.size(), [&](size_t i) {
    const Part& part = parts[i];
    const int64_t count = part.count * queries;
    float* scratch = task_scratch(static_cast<size_t>(attend_scratch(count, d) + count * (padded + 2)));
    AttendTask task = attend_task(call, part.row, part.kv_head, new_keys, new_values);
    task.first_position += part.first;
    task.query += part.first * d;
    task.count = part.count;
    task.out = scratch;
    task.maximum = task.out + count * padded;
    task.sum = task.maximum + count;
    task.scratch = task.sum + count;
    kernels_->attend(task);
    for (int64_t q = 0; q < count; ++q) {
      const int64_t step = part.first + q / queries, head = part.kv_head * queries + q % queries;
      float* out = call.output + ((part.row * call.steps + step) * call.heads + head) * d;
      for (int64_t e = 0; e < d; ++e) out[e] = task.out[q * padded + e] / task.sum[q];
    }
  });
}

}  // namespace gsrq::cpu
