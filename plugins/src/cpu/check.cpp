// Everything that can be wrong with a call, found before any memory is touched.
#include <sstream>

#include "gsrq/cpu/attention.hpp"
#include "gsrq/layout.h"

namespace gsrq::cpu {
namespace {

std::string text(const Shape& shape) {
  std::ostringstream out;
  out << '[';
  for (size_t i = 0; i < shape.size(); ++i) out << (i ? ", " : "") << shape[i];
  out << ']';
  return out.str();
}

// A tensor without elements may claim any other dimensions; within these bounds no product below overflows.
constexpr int64_t kMostHeads = int64_t{1} << 20, kMostTokens = int64_t{1} << 40;

std::string expect(const char* name, const Shape& shape, const Shape& expected, const char* meaning) {
  if (shape == expected) return {};
  return std::string(name) + " has shape " + text(shape) + ", expected " + text(expected) + " (" + meaning + ")";
}

std::string rank(const char* name, const Shape& shape, size_t wanted, const char* meaning) {
  if (shape.size() == wanted) return {};
  return std::string(name) + " has shape " + text(shape) + ", expected " + std::to_string(wanted) + " dimensions (" +
         meaning + ")";
}

std::string check_codebook(const char* name, const Shape& shape, int64_t elements, int64_t head_dim) {
  if (auto e = rank(name, shape, 4, "groups, stages, 256, width"); !e.empty()) return e;
  const int64_t groups = shape[0], stages = shape[1], width = shape[3];
  if (groups < 1 || stages < 1 || width < 1 || shape[2] != GSRQ_CODEBOOK_SIZE || stages > (1 << 16))
    return std::string(name) + " has shape " + text(shape) + ", expected [groups, stages, 256, width]";
  if (width > elements || elements % width != 0 || groups != elements / width)
    return std::string(name) + " has shape " + text(shape) + ": groups * width must be KV heads * head_dim = " +
           std::to_string(elements);
  if (head_dim % width != 0 && width % head_dim != 0)
    return std::string(name) + ": width " + std::to_string(width) + " must divide head_dim " +
           std::to_string(head_dim) + " or be a multiple of it";
  return {};
}

}  // namespace

std::string check(const Attributes& a) {
  const auto bad = [](const char* name, auto value, const char* need) {
    std::ostringstream out;
    out << "attribute " << name << " is " << value << ", must be " << need;
    return out.str();
  };
  constexpr int64_t most = kMostTokens;
  if (!(a.scale > 0 && a.scale < 1e30f)) return bad("scale", a.scale, "positive");
  if (!(a.softcap >= 0 && a.softcap < 1e30f)) return bad("softcap", a.softcap, "0 (none) or positive");
  if (a.sinks < 0 || a.sinks > most) return bad("sinks", a.sinks, "0 or more");
  if (a.window < 0 || a.window > most) return bad("window", a.window, "0 or more");
  if (a.block < 1 || a.block > most) return bad("block", a.block, "1 or more");
  static_assert(GSRQ_CODE_TILE == 8);
  if (a.codes_by_head && a.block % GSRQ_CODE_TILE != 0)
    return bad("block", a.block, "a multiple of 8 where code_order is 1");
  static_assert(GSRQ_CODEBOOK_SIZE == 256);
  if (a.beam < 1 || a.beam > GSRQ_CODEBOOK_SIZE) return bad("beam", a.beam, "1 to 256");
  if (a.sliding_window < 0) return bad("sliding_window", a.sliding_window, "0 (none) or positive");
  return {};
}

std::string check(const Attributes& a, const Shapes& s) {
  if (auto e = rank("query", s.query, 4, "batch, heads, steps, head_dim"); !e.empty()) return e;
  if (auto e = rank("key", s.key, 4, "batch, KV heads, steps, head_dim"); !e.empty()) return e;
  if (auto e = rank("cos", s.cos, 2, "positions, rope_dim / 2"); !e.empty()) return e;
  if (auto e = rank("key_codes", s.key_codes, 3, "batch, capacity, code bytes"); !e.empty()) return e;
  const int64_t batch = s.query[0], heads = s.query[1], steps = s.query[2], d = s.query[3], kv = s.key[1];
  if (d < 2 || d % 2 != 0 || d > 65536)
    return "query has shape " + text(s.query) + ": head_dim must be even and positive";
  if (batch < 0 || batch > kMostTokens || steps < 0 || steps > kMostTokens)
    return "query has shape " + text(s.query) + ": batch and steps must be 0 to 2^40";
  if (heads > kMostHeads || kv > kMostHeads)
    return "query and key have " + std::to_string(heads) + " and " + std::to_string(kv) + " heads, must be 1 to 2^20";
  if (kv < 1 || heads < 1 || heads % kv != 0)
    return "query has " + std::to_string(heads) + " heads, which must be a multiple of key's " + std::to_string(kv);
  if (auto e = expect("key", s.key, {batch, kv, steps, d}, "batch, KV heads, steps, head_dim"); !e.empty()) return e;
  if (auto e = expect("value", s.value, s.key, "as key"); !e.empty()) return e;
  if (s.cos[0] < 0 || s.cos[1] < 0 || s.cos[1] > kMostTokens)
    return "cos has shape " + text(s.cos) + ", expected [positions, rope_dim / 2]";
  if (2 * s.cos[1] > d)
    return "cos has shape " + text(s.cos) + ": rope_dim " + std::to_string(2 * s.cos[1]) + " exceeds head_dim " +
           std::to_string(d);
  if (auto e = expect("sin", s.sin, s.cos, "as cos"); !e.empty()) return e;
  if (auto e = expect("past_lengths", s.past_lengths, {batch}, "batch"); !e.empty()) return e;
  if (auto e = expect("new_lengths", s.new_lengths, {batch}, "batch"); !e.empty()) return e;
  if (auto e = check_codebook("key_codebooks", s.key_codebooks, kv * d, d); !e.empty()) return e;
  if (auto e = check_codebook("value_codebooks", s.value_codebooks, kv * d, d); !e.empty()) return e;
  const Shape& kb = s.key_codebooks;
  const Shape& vb = s.value_codebooks;
  const int64_t capacity = s.key_codes[1];
  if (capacity < 0 || capacity > kMostTokens)
    return "key_codes has shape " + text(s.key_codes) + ": capacity must be 0 to 2^40";
  if (a.codes_by_head && capacity % GSRQ_CODE_TILE != 0)
    return "key_codes has shape " + text(s.key_codes) + ": capacity must be a multiple of 8 where code_order is 1";
  if (auto e = expect("key_codes", s.key_codes, {batch, capacity, kb[0] * kb[1]}, "batch, capacity, groups * stages");
      !e.empty())
    return e;
  if (auto e = expect("value_codes", s.value_codes, {batch, capacity, vb[0] * vb[1]},
                      "batch, capacity, groups * stages");
      !e.empty())
    return e;
  const Shape exact = {batch, kv, gsrq_exact_slots(a.sinks, a.window, a.block), d};
  if (auto e = expect("key_exact", s.key_exact, exact, "batch, KV heads, sinks + window + block, head_dim"); !e.empty())
    return e;
  if (auto e = expect("value_exact", s.value_exact, exact, "as key_exact"); !e.empty()) return e;
  if (auto e = expect("key_transform", s.key_transform, {kb[0], kb[3], kb[3]}, "groups, width, width"); !e.empty())
    return e;
  if (auto e = expect("value_transform", s.value_transform, {vb[0], vb[3], vb[3]}, "groups, width, width"); !e.empty())
    return e;
  if (a.rotated_keys) return expect("key_center", s.key_center, {kv * d}, "KV heads * head_dim; key_frame is 1");
  if (!s.key_center.empty()) return "key_center is given, but attribute key_frame is 0";
  return {};
}

Call make_call(const Shapes& s, const Inputs& inputs) {
  const auto reals = [&](size_t i) { return static_cast<const float*>(inputs[i]); };
  const auto lengths = [&](size_t i) { return static_cast<const int64_t*>(inputs[i]); };
  const auto bytes = [&](size_t i) { return static_cast<const uint8_t*>(inputs[i]); };
  const auto words = [&](size_t i, const Shape& shape) {
    return Words{static_cast<const uint16_t*>(inputs[i]), shape[0], shape[1], shape[3]};
  };
  Call call{};
  call.batch = s.query[0];
  call.heads = s.query[1];
  call.steps = s.query[2];
  call.head_dim = s.query[3];
  call.kv_heads = s.key[1];
  call.positions = s.cos[0];
  call.half_rope = s.cos[1];
  call.capacity = s.key_codes[1];
  call.query = reals(0);
  call.key = reals(1);
  call.value = reals(2);
  call.cos = reals(3);
  call.sin = reals(4);
  call.past_lengths = lengths(5);
  call.new_lengths = lengths(6);
  call.key_codes = bytes(7);
  call.value_codes = bytes(8);
  call.key_exact = inputs[9];
  call.value_exact = inputs[10];
  call.key_words = words(11, s.key_codebooks);
  call.value_words = words(12, s.value_codebooks);
  call.key_transform = reals(13);
  call.value_transform = reals(14);
  call.key_center = reals(15);
  return call;
}

std::string check(const Attributes& a, const Call& call) {
  for (int64_t b = 0; b < call.batch; ++b) {
    const int64_t past = call.past_lengths[b], fresh = call.new_lengths[b];
    const std::string row = "[" + std::to_string(b) + "] is ";
    if (past < 0 || past > kMostTokens)
      return "past_lengths" + row + std::to_string(past) + ", must be 0 or more";
    if (fresh < 0 || fresh > call.steps)
      return "new_lengths" + row + std::to_string(fresh) + ", must be 0 to " + std::to_string(call.steps) +
             ", the steps of query";
    const int64_t total = past + fresh;
    if (total > call.positions)
      return "row " + std::to_string(b) + ": " + std::to_string(total) + " tokens exceed the rotary table's " +
             std::to_string(call.positions) + " positions";
    const int64_t coded = gsrq_coded(total, a.sinks, a.window, a.block);
    if (coded > call.capacity)
      return "row " + std::to_string(b) + ": " + std::to_string(coded) + " coded tokens exceed the cache's capacity of " +
             std::to_string(call.capacity);
  }
  return {};
}

}  // namespace gsrq::cpu
