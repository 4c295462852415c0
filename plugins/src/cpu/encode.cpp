// Coding of the blocks that leave the window, from their exact values.
#include "gsrq/cpu/attention.hpp"
#include "gsrq/layout.h"
#include "tasks.hpp"

namespace gsrq::cpu {
namespace {

constexpr int64_t kRows = 64;  // tokens of an encoding task

// Element e of a head's key in the rotated frame, RoPE(key - center): float64, rounded once.
float framed(const Rope& rope, int64_t token, const float* key, const float* center, int64_t e) {
  const auto centerd = [&](int64_t i) { return static_cast<double>(key[i]) - static_cast<double>(center[i]); };
  if (e >= 2 * rope.half) return static_cast<float>(centerd(e));
  const int64_t p = rope.interleaved ? e / 2 : e % rope.half;
  int64_t first, second;
  pair_elements(p, rope.half, rope.interleaved, &first, &second);
  const double c = rope.cos[token * rope.half + p], s = rope.sin[token * rope.half + p];
  const double x = centerd(first), y = centerd(second);
  return static_cast<float>(e == second ? y * c + x * s : x * c - y * s);
}

bool is_identity(const float* transform, const Words& words) {
  const int64_t width = words.width;
  for (int64_t g = 0; g < words.groups; ++g)
    for (int64_t i = 0; i < width; ++i)
      for (int64_t j = 0; j < width; ++j)
        if (transform[(g * width + i) * width + j] != (i == j ? 1.0f : 0.0f)) return false;
  return true;
}

}  // namespace

void Layer::build_metric(Metric& metric, const Words& words, const float* transform, const Threads& threads) const {
  const int64_t width = words.width, groups = words.groups;
  std::vector<double> matrix, norms(static_cast<size_t>(groups * words.stages * kCodewords));
  const bool identity = is_identity(transform, words);
  if (!identity) matrix.assign(static_cast<size_t>(groups * width * width), 0.0);
  for_each_task(threads, static_cast<size_t>(groups), [&](size_t i) {
    const int64_t g = static_cast<int64_t>(i);
    const float* a = transform + g * width * width;
    double* m = identity ? nullptr : matrix.data() + g * width * width;
    if (m != nullptr)
      for (int64_t k = 0; k < width; ++k)
        for (int64_t row = 0; row < width; ++row) {
          const double x = a[k * width + row];
          for (int64_t col = 0; col < width; ++col) m[row * width + col] += x * a[k * width + col];
        }
    NormsTask task{};
    task.words = words;
    task.group = g;
    task.metric = m;
    task.norms = norms.data() + g * words.stages * kCodewords;
    task.scratch = reinterpret_cast<double*>(task_scratch(static_cast<size_t>(4 * width)));
    kernels_->norms(task);
  });
  metric.matrix = std::move(matrix);
  metric.norms = std::move(norms);
}

void Layer::encode(const Call& call, const void* new_keys, const void* new_values, const Threads& threads) {
  const Attributes& a = attributes_;
  struct Part {
    bool values;
    int64_t row, group, first, count;  // coded rows first .. first + count - 1
  };
  std::vector<Part> parts;
  const int64_t most = std::clamp<int64_t>(256 / a.beam, 4, kRows);
  for (int64_t b = 0; b < call.batch; ++b) {
    const int64_t past = call.past_lengths[b];
    const int64_t before = gsrq_coded(past, a.sinks, a.window, a.block);
    const int64_t after = gsrq_coded(past + call.new_lengths[b], a.sinks, a.window, a.block);
    for (int64_t first = before; first < after; first += most)
      for (int side = 0; side < 2; ++side) {
        const Words& words = side ? call.value_words : call.key_words;
        for (int64_t g = 0; g < words.groups; ++g)
          parts.push_back({side != 0, b, g, first, std::min(most, after - first)});
      }
  }
  if (parts.empty()) return;

  Metric local[2];  // of codebooks that may change from call to call
  Metric* metrics[2] = {constant_keys_ ? &key_metric_ : &local[0], constant_values_ ? &value_metric_ : &local[1]};
  for (int side = 0; side < 2; ++side)
    std::call_once(metrics[side]->once, [&] {
      build_metric(*metrics[side], side ? call.value_words : call.key_words,
                   side ? call.value_transform : call.key_transform, threads);
    });

  const int64_t d = call.head_dim, bytes = element_size(call.element);
  const int64_t slots = gsrq_exact_slots(a.sinks, a.window, a.block);
  for_each_task(threads, parts.size(), [&](size_t i) {
    const Part& part = parts[i];
    const Words& words = part.values ? call.value_words : call.key_words;
    const Metric& metric = *metrics[part.values];
    const auto* exact = static_cast<const unsigned char*>(part.values ? call.value_exact : call.key_exact);
    const auto* fresh = static_cast<const unsigned char*>(part.values ? new_values : new_keys);
    const int64_t width = words.width, run = std::min(width, d), past = call.past_lengths[part.row];
    const int64_t doubles = encode_scratch(part.count, width, words.stages, a.beam);
    double* scratch = reinterpret_cast<double*>(
        task_scratch(static_cast<size_t>(2 * (doubles + part.count * width) + d)));
    double* vectors = scratch + doubles;
    float* line = reinterpret_cast<float*>(vectors + part.count * width);
    const bool rotated = !part.values && a.rotated_keys;
    const Rope rope{call.cos, call.sin, call.half_rope, a.rope_interleaved};
    for (int64_t t = 0; t < part.count; ++t) {
      const int64_t token = a.sinks + part.first + t;
      for (int64_t e = 0; e < width; e += run) {
        const int64_t element = part.group * width + e, head = part.row * call.kv_heads + element / d;
        const int64_t row = token < past
                                ? head * slots + gsrq_slot(token, a.sinks, a.window, a.block)
                                : head * call.steps + token - past;
        const unsigned char* source = token < past ? exact : fresh;
        if (rotated) {  // RoPE mixes the elements of the whole head
          kernels_->widen(source + row * d * bytes, line, d, call.element);
          const float* center = call.key_center + element / d * d;
          for (int64_t j = 0; j < run; ++j)
            vectors[t * width + e + j] = framed(rope, token, line, center, element % d + j);
        } else {
          kernels_->widen(source + (row * d + element % d) * bytes, line, run, call.element);
          for (int64_t j = 0; j < run; ++j) vectors[t * width + e + j] = line[j];
        }
      }
    }
    EncodeTask task{};
    task.words = words;
    task.group = part.group;
    task.rows = part.count;
    task.beam = a.beam;
    task.metric = metric.matrix.empty() ? nullptr : metric.matrix.data() + part.group * width * width;
    task.norms = metric.norms.data() + part.group * words.stages * kCodewords;
    task.vectors = vectors;
    const StoredCodes stored(a, call, words, part.row);
    task.codes = (part.values ? call.present_value_codes : call.present_key_codes) + stored.at(part.group, 0);
    task.code_rows = stored.rows(part.first);
    task.scratch = scratch;
    kernels_->encode(task);
  });
}

}  // namespace gsrq::cpu
