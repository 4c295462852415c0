// One new token against many coded ones: scores, then binned weights, then the exact tokens and the sum of it all.
// Scratch, kept by the calling thread between calls and shared by all layers: 4 bytes a coded token and query head
// (heads padded to 4 a KV head) of the rows decoded together, plus stages / bin_stages partial outputs; 4 MiB for 32
// heads at 32k tokens. A pool thread keeps one task's: bins of 64 KiB and less, or a tile of attention, near 0.5 MiB.
#include <cmath>

#include "gsrq/cpu/attention.hpp"
#include "gsrq/layout.h"
#include "tasks.hpp"

namespace gsrq::cpu {
namespace {

constexpr int64_t kSplitTokens = 4096;  // a key slice's codewords are read once for at least so many tokens
constexpr int64_t kScoreTasks = 16;     // wanted, where the tokens suffice
constexpr int64_t kBinFloats = 16384;   // bins of a value task: 64 KiB
constexpr int64_t kPanelWords = 64;     // codewords of a panel, see TableTask

struct Row {  // a batch row being decoded
  int64_t row, first, count, split_size, splits;
  float *query, *weights, *maximum, *sum, *factors, *coded, *table;  // of all KV heads
};

}  // namespace

const Layer::KeyState* Layer::key_state(const Call& call, const Threads& threads) {
  const std::lock_guard<std::mutex> lock(key_mutex_);
  if (key_state_ != nullptr && key_state_->half_rope == call.half_rope) return key_state_.get();
  const Words& words = call.key_words;
  const int64_t slices = round_up(call.head_dim / 2, kLanes) / kLanes, pairs = (words.stages + 1) / 2;
  auto state = std::make_unique<KeyState>();
  if (attributes_.rotated_keys) {
    prepare_panels(call, *state, threads);
    state->half_rope = call.half_rope;
    key_state_ = std::move(state);
    return key_state_.get();
  }
  const int64_t per_head = slices * words.stages * kCodewords * 2 * kLanes;
  auto* data = static_cast<int16_t*>(state->words.reserve(static_cast<size_t>(call.kv_heads * per_head) * 2));
  state->multipliers.resize(static_cast<size_t>(call.kv_heads * pairs));
  state->unit.resize(static_cast<size_t>(call.kv_heads * slices * kLanes));
  state->bias.resize(static_cast<size_t>(call.kv_heads * slices * 2 * kLanes));
  for_each_task(threads, static_cast<size_t>(call.kv_heads), [&](size_t i) {
    const int64_t h = static_cast<int64_t>(i);
    PrepareTask task{};
    task.words = words;
    task.group = h * call.head_dim / words.width;
    task.column = h * call.head_dim % words.width;
    task.head_dim = call.head_dim;
    task.half_rope = call.half_rope;
    task.interleaved = attributes_.rope_interleaved;
    task.out_words = data + h * per_head;
    task.out_multipliers = state->multipliers.data() + h * pairs;
    task.out_unit = state->unit.data() + h * slices * kLanes;
    task.out_bias = state->bias.data() + h * slices * 2 * kLanes;
    task.scratch = task_scratch(static_cast<size_t>(3 * words.stages));
    kernels_->prepare_keys(task);
  });
  state->half_rope = call.half_rope;
  key_state_ = std::move(state);
  return key_state_.get();
}

void Layer::prepare_panels(const Call& call, KeyState& state, const Threads& threads) const {
  const Words& words = call.key_words;
  const int64_t d = call.head_dim, slices = round_up(d / 2, kLanes) / kLanes;
  const int64_t size = slices * 2 * kLanes, stage_size = size * kCodewords;
  auto* data = static_cast<uint16_t*>(
      state.panels.reserve(static_cast<size_t>(call.kv_heads * words.stages * stage_size) * sizeof(uint16_t)));
  state.center.assign(static_cast<size_t>(call.kv_heads * size), 0.0f);
  std::vector<int64_t> order(static_cast<size_t>(size), -1);  // element of a head at each place of the slices
  for (int64_t p = 0; p < d / 2; ++p) {
    int64_t first, second;
    pair_elements(p, call.half_rope, attributes_.rope_interleaved, &first, &second);
    const int64_t place = p / kLanes * 2 * kLanes + p % kLanes;
    order[static_cast<size_t>(place)] = first;
    order[static_cast<size_t>(place + kLanes)] = second;
  }
  for (int64_t h = 0; h < call.kv_heads; ++h)
    for (int64_t i = 0; i < size; ++i)
      if (order[static_cast<size_t>(i)] >= 0)
        state.center[static_cast<size_t>(h * size + i)] = call.key_center[h * d + order[static_cast<size_t>(i)]];
  for_each_task(threads, static_cast<size_t>(call.kv_heads * words.stages), [&](size_t task) {
    const int64_t h = static_cast<int64_t>(task) / words.stages, r = static_cast<int64_t>(task) % words.stages;
    const int64_t group = h * d / words.width, column = h * d % words.width;
    const uint16_t* stage = words.data + (group * words.stages + r) * kCodewords * words.width + column;
    uint16_t* out = data + static_cast<int64_t>(task) * stage_size;
    for (int64_t k = 0; k < kCodewords; ++k)
      for (int64_t i = 0; i < size; ++i) {
        const int64_t e = order[static_cast<size_t>(i)];
        out[(k / kPanelWords * size + i) * kPanelWords + k % kPanelWords] = e < 0 ? 0 : stage[k * words.width + e];
      }
  });
}

KeySlices Layer::key_slices(const KeyState& state, const Call& call, int64_t kv_head) const {
  const int64_t stages = call.key_words.stages, slices = round_up(call.head_dim / 2, kLanes) / kLanes;
  KeySlices out{};
  out.words = static_cast<const int16_t*>(state.words.data) + kv_head * slices * stages * kCodewords * 2 * kLanes;
  out.multipliers = state.multipliers.data() + kv_head * ((stages + 1) / 2);
  out.unit = state.unit.data() + kv_head * slices * kLanes;
  out.bias = state.bias.data() + kv_head * slices * 2 * kLanes;
  out.slices = slices;
  out.stages = stages;
  return out;
}

void Layer::decode(const Call& call, const KeyState& state, const std::vector<int64_t>& batch_rows,
                   const void* new_keys, const void* new_values, const Threads& threads) const {
  const Attributes& a = attributes_;
  const int64_t d = call.head_dim, padded = round_up(d, kLanes), kv = call.kv_heads;
  const int64_t queries = call.heads / kv, lanes = round_up(queries, 4);
  const int64_t slices = round_up(d / 2, kLanes) / kLanes;
  const Words& words = call.value_words;
  const int64_t group_heads = std::max<int64_t>(1, words.width / d), width = std::min(words.width, d);
  const int64_t padded_width = round_up(width, kLanes);
  const int64_t bin_stages =
      std::clamp<int64_t>(kBinFloats / (kCodewords * lanes * group_heads), 1, words.stages);
  const int64_t chunks = (words.stages + bin_stages - 1) / bin_stages;
  const int64_t coded_size = words.groups * chunks * group_heads * queries * padded_width;

  const int64_t table_size = a.rotated_keys ? kv * call.key_words.stages * kCodewords * lanes : 0;

  // The floats that the tasks share: 16-float multiples, so that every array is aligned.
  std::vector<Row> rows;
  const int64_t want = std::max<int64_t>(1, kScoreTasks / (static_cast<int64_t>(batch_rows.size()) * kv));
  size_t total = 0;
  const auto take = [&total](int64_t floats) {
    const size_t at = total;
    total += static_cast<size_t>(round_up(floats, 16));
    return at;
  };
  std::vector<size_t> offsets;
  for (int64_t b : batch_rows) {
    const CodedRange range = coded_range(a, call, b);
    Row row{};
    row.row = b;
    row.first = range.first;
    row.count = range.count;
    row.split_size = std::max(kSplitTokens, round_up((range.count + want - 1) / want, kChunk));
    row.splits = (range.count + row.split_size - 1) / row.split_size;
    rows.push_back(row);
    for (int64_t size : {kv * slices * lanes * 2 * kLanes, kv * round_up(range.count, kLanes) * lanes,
                         kv * row.splits * lanes, kv * row.splits * lanes, kv * row.splits * lanes, coded_size,
                         table_size})
      offsets.push_back(take(size));
  }
  float* shared = call_scratch(total);
  for (size_t i = 0; i < rows.size(); ++i) {
    float** fields[] = {&rows[i].query, &rows[i].weights, &rows[i].maximum, &rows[i].sum, &rows[i].factors,
                        &rows[i].coded, &rows[i].table};
    for (size_t f = 0; f < 7; ++f) *fields[f] = shared + offsets[7 * i + f];
  }

  // The queries: rotated, scaled, cut into slices of RoPE pairs.
  for (const Row& row : rows) {
    const int64_t position = call.past_lengths[row.row];
    std::fill(row.query, row.query + kv * slices * lanes * 2 * kLanes, 0.0f);
    for (int64_t h = 0; h < call.heads; ++h) {
      const float* q = call.query + (row.row * call.heads + h) * call.steps * d;
      for (int64_t p = 0; p < d / 2; ++p) {
        int64_t first, second;
        pair_elements(p, call.half_rope, a.rope_interleaved, &first, &second);
        const bool turns = p < call.half_rope;
        const float c = turns ? call.cos[position * call.half_rope + p] : 1;
        const float s = turns ? call.sin[position * call.half_rope + p] : 0;
        float* out = row.query + (((h / queries) * slices + p / kLanes) * lanes + h % queries) * 2 * kLanes + p % kLanes;
        out[0] = (q[first] * c - q[second] * s) * a.scale;
        out[kLanes] = (q[second] * c + q[first] * s) * a.scale;
      }
    }
  }

  struct Part {
    const Row* row;
    int64_t a, b;
  };
  std::vector<Part> parts;
  const int64_t stages = call.key_words.stages;
  if (a.rotated_keys) {
    for (const Row& row : rows)
      for (int64_t h = 0; h < kv; ++h)
        for (int64_t r = 0; r < stages; ++r) parts.push_back({&row, h, r});
    for_each_task(threads, parts.size(), [&](size_t i) {
      const int64_t h = parts[i].a, at = h * stages + parts[i].b;
      TableTask task{};
      task.panels = static_cast<const uint16_t*>(state.panels.data) + at * slices * 2 * kLanes * kCodewords;
      task.slices = slices;
      task.lanes = lanes;
      task.query = parts[i].row->query + h * slices * lanes * 2 * kLanes;
      task.table = parts[i].row->table + at * kCodewords * lanes;
      kernels_->build_table(task);
    });
    parts.clear();
  }
  for (const Row& row : rows)
    for (int64_t h = 0; h < kv; ++h)
      for (int64_t split = 0; split < row.splits; ++split) parts.push_back({&row, h, split});
  for_each_task(threads, parts.size(), [&](size_t i) {
    const Row& row = *parts[i].row;
    const int64_t h = parts[i].a, split = parts[i].b, begin = split * row.split_size;
    const auto describe = [&](auto& task) {
      task.rope = {call.cos, call.sin, call.half_rope, a.rope_interleaved};
      const StoredCodes stored(a, call, call.key_words, row.row);
      task.codes = call.present_key_codes + stored.at(h * d / call.key_words.width, 0);
      task.code_rows = stored.rows(gsrq_code_row(row.first + begin, a.sinks));
      task.count = std::min(row.split_size, row.count - begin);
      task.first_token = row.first + begin;
      task.query = row.query + h * slices * lanes * 2 * kLanes;
      task.lanes = lanes;
      task.softcap = a.softcap;
      task.weights = row.weights + (h * round_up(row.count, kLanes) + begin) * lanes;
      task.maximum = row.maximum + (h * row.splits + split) * lanes;
      task.sum = row.sum + (h * row.splits + split) * lanes;
    };
    if (a.rotated_keys) {
      LookupTask task{};
      describe(task);
      task.table = row.table + h * stages * kCodewords * lanes;
      task.center = state.center.data() + h * slices * 2 * kLanes;
      task.stages = stages;
      task.slices = slices;
      task.scratch = task_scratch(static_cast<size_t>(lookup_scratch(slices, lanes)));
      kernels_->lookup(task);
    } else {
      ScoreTask task{};
      describe(task);
      task.keys = key_slices(state, call, h);
      task.scratch = task_scratch(static_cast<size_t>(score_scratch(lanes)));
      kernels_->score(task);
    }
  });

  // One maximum for all splits of a head; what each split's weights are multiplied by. The first split's maximum and
  // sum then hold the head's.
  for (const Row& row : rows)
    for (int64_t h = 0; h < kv; ++h)
      for (int64_t l = 0; l < lanes; ++l) {
        const int64_t at = h * row.splits * lanes + l;
        float most = row.maximum[at], sum = 0;
        for (int64_t s = 1; s < row.splits; ++s) most = std::max(most, row.maximum[at + s * lanes]);
        for (int64_t s = 0; s < row.splits; ++s) {
          const float factor = std::exp(row.maximum[at + s * lanes] - most);
          row.factors[at + s * lanes] = factor;
          sum += row.sum[at + s * lanes] * factor;
        }
        row.maximum[at] = most;
        row.sum[at] = sum;
      }

  parts.clear();
  for (const Row& row : rows)
    for (int64_t g = 0; g < words.groups; ++g)
      for (int64_t chunk = 0; chunk < chunks; ++chunk) parts.push_back({&row, g, chunk});
  for_each_task(threads, parts.size(), [&](size_t i) {
    const Row& row = *parts[i].row;
    const int64_t g = parts[i].a, chunk = parts[i].b, head = g * words.width / d;
    ValueTask task{};
    task.words = words;
    task.group = g;
    task.first_stage = chunk * bin_stages;
    task.stages = std::min(bin_stages, words.stages - task.first_stage);
    const StoredCodes stored(a, call, words, row.row);
    task.codes = call.present_value_codes + stored.at(g, task.first_stage);
    task.code_rows = stored.rows(gsrq_code_row(row.first, a.sinks));
    task.count = row.count;
    task.heads = group_heads;
    task.queries = queries;
    task.lanes = lanes;
    task.width = width;
    task.weight_stride = round_up(row.count, kLanes) * lanes;
    task.weights = row.weights + head * task.weight_stride;
    task.splits = row.splits;
    task.split_size = row.split_size;
    task.factors = row.factors + head * row.splits * lanes;
    task.out = row.coded + (g * chunks + chunk) * group_heads * queries * padded_width;
    task.scratch = task_scratch(static_cast<size_t>(value_scratch(task.stages, group_heads * lanes, width)));
    kernels_->values(task);
  });

  parts.clear();
  for (const Row& row : rows)
    for (int64_t h = 0; h < kv; ++h) parts.push_back({&row, h, 0});
  for_each_task(threads, parts.size(), [&](size_t i) {
    const Row& row = *parts[i].row;
    const int64_t h = parts[i].a;
    float* scratch = task_scratch(static_cast<size_t>(attend_scratch(queries, d) + queries * (padded + 2)));
    AttendTask task = attend_task(call, row.row, h, new_keys, new_values);
    task.attend_coded = false;
    task.out = scratch;
    task.maximum = task.out + queries * padded;
    task.sum = task.maximum + queries;
    task.scratch = task.sum + queries;
    kernels_->attend(task);
    for (int64_t l = 0; l < queries; ++l) {
      const float coded_most = row.maximum[h * row.splits * lanes + l];
      const float most = std::max(coded_most, task.maximum[l]);  // of no exact token: -inf, weight 0
      const float exact = std::exp(task.maximum[l] - most), coded = std::exp(coded_most - most);
      const float sum = task.sum[l] * exact + row.sum[h * row.splits * lanes + l] * coded;
      float* out = call.output + (row.row * call.steps * call.heads + h * queries + l) * d;
      for (int64_t e = 0; e < d; e += width) {
        const int64_t g = (h * d + e) / words.width, member = h * d % words.width / d;
        for (int64_t j = 0; j < width; ++j) {
          float value = 0;
          for (int64_t chunk = 0; chunk < chunks; ++chunk)
            value += row.coded[(((g * chunks + chunk) * group_heads + member) * queries + l) * padded_width + j];
          out[e + j] = (task.out[l * padded + e + j] * exact + value * coded) / sum;
        }
      }
    }
  });
}

}  // namespace gsrq::cpu
