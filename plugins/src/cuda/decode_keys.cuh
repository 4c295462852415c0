// Scores of coded keys: a warp takes two tiles of 16 tokens of a chunk in turn, over one slice of the head's dims. What is
// gathered runs ahead of what is multiplied, so that the next tile's codewords come in while one is turned. docs/cuda.md.
#pragma once

#include "decode_cluster.cuh"

namespace gsrq::cuda::decoding {

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

__device__ inline uint4 load_shared(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
  return v;
}

template <int Blocks, int Lanes, bool Fast>
__device__ void score_keys(const gsrq_layer& layer, const gsrq_call& call, const DecodePlan& plan, const Constants& constants,
                           const Shared& shared, Cursor cursor, uint32_t rank) {
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4, parity = g & 1;
  const int slice = rank % plan.slices, part_of_stages = rank / plan.slices, split = part_of_stages % plan.splits;
  const int half = layer.half_rope, bytes = layer.keys.groups * layer.keys.stages;
  const int first_block = split * plan.blocks;

  // Of the CTA's stages: their multipliers as matrices, and what a unit of the integer sum is worth.
  const KeyScale& scale = constants.scales[part_of_stages];
  const float unit = scale.unit, shrink = scale.shrink;
  uint32_t low[Blocks], high[Blocks];
#pragma unroll
  for (int i = 0; i < Blocks; ++i) {
    const uint32_t m = static_cast<uint8_t>(scale.multipliers[stage_of(Blocks, i, t)]);
    low[i] = g < 4 ? m << (8 * g) : 0;
    high[i] = g < 4 ? 0 : m << (8 * (g - 4));
  }

  // A gathered vector of 16 bytes, half of a codeword's slice, fills the fragment of one product: of its four words two
  // are the row of the token, two the row 8 below. A thread gets two RoPE pairs of the half: near(t) and near(t) + 2.
  // Rows of odd g gather the halves in the other order, so that no two threads of a phase meet in a bank. Where there are at
  // most four heads, columns 4 to 7 of the product are the same heads with the halves of the query swapped, and rows 8 to 15
  // take the opposite order: of a row either columns 0 to 3 or 4 to 7 are its scores, a thread has one of both rows.
  const int near = t < 2 ? t : t + 2;
  constexpr bool kTwice = Lanes == 4;
  const int swapped = kTwice && g >= 4 ? 1 : 0;  // the thread's halves of the query
  const auto half_of = [&](int o, int u) { return u ^ parity ^ (kTwice ? o : 0); };
  float turn_c[2][2][2], turn_s[2][2][2];  // [octet of tokens][half, in the thread's order][pair]
#pragma unroll
  for (int o = 0; o < 2; ++o)
#pragma unroll
    for (int u = 0; u < 2; ++u)
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int p = slice * 16 + half_of(o, u) * 8 + near + 2 * k;
        float c = 1, s = 0;
        const int64_t offset = min(g + 8 * o, layer.positions - 1);
        if (p < half) {
          const float inverse = __frcp_rn(layer.cos[p]);
          c = layer.cos[offset * half + p] * inverse;
          s = layer.sin[offset * half + p] * inverse;
        }
        turn_c[o][u][k] = c * shrink;
        turn_s[o][u][k] = s * shrink;
      }
  // From one tile of the warp to its next the queries turn back by so many positions.
  constexpr int kStride = kKeyWarps * kTile;
  float step_c[2][2], step_s[2][2];  // [half, as the query's][pair]
#pragma unroll
  for (int u = 0; u < 2; ++u)
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int p = slice * 16 + (u ^ swapped) * 8 + near + 2 * k;
      const int64_t at = min(kStride, layer.positions - 1);
      step_c[u][k] = p < half ? layer.cos[at * half + p] * __frcp_rn(layer.cos[p]) : 1.0f;
      step_s[u][k] = p < half ? layer.sin[at * half + p] * __frcp_rn(layer.cos[p]) : 0.0f;
    }

  // Where a thread reads of codeword 0 of the first stages: the two halves in its order.
  uint32_t words = shared_address(shared_memory) + t * 32 + parity * 16, other_words = words ^ 16;
  uint32_t byte_pair = t | (4 + t) << 4;
  int token_in_chunk = warp * kTile + g;
  keep(words);
  keep(other_words);
  keep(byte_pair);
  keep(token_in_chunk);
#pragma unroll
  for (int i = 0; i < Blocks; ++i) {
    keep(low[i]);
    keep(high[i]);
  }
  // Where the scores of the warp's two tiles go, in their owners' memory. Of four heads a thread
  // has heads 2 (t % 2) and + 1 of token g or g + 8, else heads 2 t and 2 t + 1 of both.
  const bool stores_upper = (t >= 2) != (parity != 0);
  const int stored_token = g + (kTwice && stores_upper ? 8 : 0), stored_head = kTwice ? 2 * t % 4 : 2 * t;
  uint32_t targets[2], owners = 0;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    const int tile = m * kKeyWarps + warp, owner = tile % plan.owners, place = rank * plan.own_tiles + tile / plan.owners;
    targets[m] = remote(shared_address(shared.scores) + ((place * kTile + stored_token) * Lanes + stored_head) * 4, owner);
    owners |= owner << (8 * m);
    keep(targets[m]);
  }
  uint32_t buffer_bytes = plan.cluster * plan.own_tiles * kTile * Lanes * 4, empty = shared.empty, full = shared.full;
  keep(buffer_bytes);
  keep(empty);
  keep(full);
  constexpr bool kOneWord = Blocks == 4;  // stage_of
  constexpr int kWords = kOneWord ? 1 : Blocks, kPacked = (Blocks + 3) / 4, kAhead = Blocks < 3 ? Blocks : 3;
  int loaded = -1;
  uint32_t chunk_index = 0;

  uint32_t codes[2][2][kPacked], coming[2][2][kWords];  // [tile][octet]: the thread's bytes; the next chunk's words
  uint4 gathered[Blocks + kAhead][2][2];  // [block][octet][half, in the thread's order]: of a tile, then of the next
  const auto pack = [&](uint32_t (&out)[2][2][kPacked], const uint32_t (&from)[2][2][kWords]) {  // byte t of each word
    const auto word = [&](int m, int o, int i) { return i < kWords ? from[m][o][i < kWords ? i : 0] : 0u; };
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int o = 0; o < 2; ++o)
#pragma unroll
        for (int j = 0; j < kPacked; ++j)
          out[m][o][j] = kOneWord ? from[m][o][0]
                                  : __byte_perm(__byte_perm(word(m, o, 4 * j), word(m, o, 4 * j + 1), byte_pair),
                                                __byte_perm(word(m, o, 4 * j + 2), word(m, o, 4 * j + 3), byte_pair), 0x5410);
  };
  const auto gather = [&](uint4 (&out)[2][2], const uint32_t (&from)[2][kPacked], int i) {
#pragma unroll
    for (int o = 0; o < 2; ++o) {
      const uint32_t row = __byte_perm(from[o][i / 4], 0, 0x4440 | i % 4) * (kBlockStages * kSliceDims);
      out[o][kTwice ? o : 0] = load_shared(row + words + i * kBlockBytes);
      out[o][kTwice ? 1 - o : 1] = load_shared(row + other_words + i * kBlockBytes);
    }
  };

  // Codes of an item's tokens. Those of the next item are fetched before this one ends.
  struct Source {
    const int8_t* linear;  // of a linear cache at the item's first token, where the CTA's stages, or the thread's, begin
    int last_token, row, first_row, first_byte, last_byte;
  };
  const auto source_of = [&](const Cursor& of) {
    const Range range = coded_range(layer, call, of.row);
    const int group_byte = static_cast<int>(static_cast<int64_t>(of.vhead / plan.parts) * layer.head_dim / layer.keys.width) *
                           layer.keys.stages;
    Source out;
    out.first_byte = group_byte + first_block * kBlockStages + (kOneWord ? 4 * t : 0);
    out.last_byte = group_byte + layer.keys.stages;
    out.row = of.row;
    out.first_row = range.first - layer.sinks;
    out.last_token = range.count - 1;
    out.linear = call.key_codes + (of.row * call.capacity + out.first_row) * bytes + out.first_byte;
    return out;
  };
  const auto fetch = [&](uint32_t (&out)[2][2][kWords], const Source& source, int chunk) {  // past the row: its last token
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int o = 0; o < 2; ++o) {
        const int i = min(chunk * kChunk + token_in_chunk + m * kStride + 8 * o, source.last_token);
        if constexpr (Fast) {
          const uint64_t at = static_cast<uint64_t>(static_cast<uint32_t>(i)) * static_cast<uint32_t>(bytes);
          load_codes<kWords, true>(out[m][o], source.linear + at, 0, 0);
        } else {
          const int8_t* row = call.key_codes + row_of(call, source.row, source.first_row + i) * bytes;
          load_codes<kWords, false>(out[m][o], row, source.first_byte, source.last_byte);
        }
      }
  };

  if (cursor.done()) return;
  Source source = source_of(cursor);
  fetch(coming, source, cursor.first);
  pack(codes, coming);
  fetch(coming, source, cursor.first + 1);  // again below if that is the next item's
  for (;;) {
    Cursor after = cursor;
    after.next(layer, call);
    Source next = after.done() ? source : source_of(after);  // its first chunk is chunk 0
    volatile Parked parked;
    park(parked, after);
    const int kv_head = cursor.vhead / plan.parts, part = cursor.vhead % plan.parts;
    if (kv_head != loaded) {
      sync_warps<kKeyThreads>(1);
      const uint4* from = reinterpret_cast<const uint4*>(
          constants.words + (static_cast<int64_t>(kv_head) * plan.cluster + rank) * Blocks * kBlockBytes);
      uint4* to = reinterpret_cast<uint4*>(shared_memory);
#pragma unroll 8
      for (int i = thread; i < Blocks * kBlockBytes / 16; i += kKeyThreads) to[i] = from[i];
      loaded = kv_head;
      sync_warps<kKeyThreads>(1);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) gather(gathered[i], codes[0], i);
    }
    if (cursor.stop - cursor.first == 1) fetch(coming, next, 0);
    const int first_token = layer.sinks + source.first_row;
    // In local memory until it is needed: registers are short.
    const int8_t* volatile next_linear = next.linear;
    volatile int next_last = next.last_token;

    // The queries: head g's pairs of the slice, turned to the new token's position and back by a tile's first token.
    const int of_part = kTwice ? g % 4 : g, head = kv_head * plan.group + part * plan.part_heads + of_part;
    const bool real = of_part < plan.part_heads && part * plan.part_heads + of_part < plan.group;
    float query_x[2][2], query_y[2][2], scale_0 = 0, scale_1 = 0;  // scales: of heads 2 t and 2 t + 1
    const auto anchor = [&](int chunk) {
      int row = cursor.row, first_pair = slice * 16 + near;
      keep(row);  // addresses are not worth registers of the loop
      keep(first_pair);
      const int64_t position = min(call.past_lengths[row], static_cast<int64_t>(layer.positions) - 1);
      const int64_t base = min(first_token + chunk * kChunk + warp * kTile, layer.positions - 1);
      float most = 0;
#pragma unroll
      for (int u = 0; u < 2; ++u)
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const int p = first_pair + (u ^ swapped) * 8 + 2 * k;
          int e0, e1;
          pair_elements(layer, p, &e0, &e1);
          float x = 0, y = 0;
          if (real) {
            const int64_t at = (static_cast<int64_t>(row) * layer.heads + head) * layer.head_dim;
            x = load(call.query, at + e0, call.dtype);
            y = load(call.query, at + e1, call.dtype);
          }
          most = fmaxf(most, fmaxf(fabsf(x), fabsf(y)));
          if (p < half) {
            const float pc = layer.cos[position * half + p], ps = layer.sin[position * half + p];
            const float bc = layer.cos[base * half + p], bs = layer.sin[base * half + p];
            const float turned_x = x * pc - y * ps, turned_y = y * pc + x * ps;
            x = turned_x * bc + turned_y * bs;
            y = turned_y * bc - turned_x * bs;
          }
          query_x[u][k] = x;
          query_y[u][k] = y;
        }
      most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
      most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
      const float inverse = most > 0 ? __frcp_rn(most) : 0.0f;  // float16 queries of size 1
#pragma unroll
      for (int u = 0; u < 2; ++u)
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          query_x[u][k] *= inverse;
          query_y[u][k] *= inverse;
        }
      const float query_scale = most * unit * layer.scale * (layer.softcap > 0 ? 1.0f : kLog2e);
      scale_0 = __shfl_sync(~0u, query_scale, 8 * t);
      scale_1 = __shfl_sync(~0u, query_scale, 8 * t + 4);
    };

    // Two chunks ahead, and how many of those are left of this item.
    int ahead = cursor.first + 2, left_ahead = cursor.stop - ahead;
    const auto go_on = [&] {
      source = next;
      source.linear = next_linear;
      source.last_token = next_last;
    };
    if (left_ahead <= 0) {
      ahead = -left_ahead;
      go_on();
    }
#pragma unroll 1
    for (int chunk = cursor.first; chunk < cursor.stop; chunk += kAnchorChunks) {
      anchor(chunk);  // rounding errors of the turns must not add up
#pragma unroll 1
      for (int left = min(cursor.stop - chunk, kAnchorChunks); left > 0; --left, ++chunk_index) {
        uint32_t next_codes[2][2][kPacked];
        pack(next_codes, coming);
        fetch(coming, source, ahead++);
        if (--left_ahead == 0) {
          ahead = 0;
          go_on();
        }
        const uint32_t buffer = chunk_index & (plan.buffers - 1);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          int sums[2][2][4];  // [octet][half]
#pragma unroll
          for (int o = 0; o < 2; ++o)
#pragma unroll
            for (int u = 0; u < 2; ++u)
#pragma unroll
              for (int k = 0; k < 4; ++k) sums[o][u][k] = 0;
#pragma unroll
          for (int i = 0; i < Blocks; ++i) {
            const int next = i + kAhead;
            if (next < Blocks) gather(gathered[next], codes[m], next);
            else gather(gathered[next], m == 0 ? codes[1] : next_codes[0], next - Blocks);
#pragma unroll
            for (int o = 0; o < 2; ++o)
#pragma unroll
              for (int u = 0; u < 2; ++u) {
                const uint4 v = gathered[i][o][u];
                mma_int8(sums[o][u], v.x, v.y, v.z, v.w, low[i], high[i]);
              }
          }
#pragma unroll
          for (int i = 0; i < kAhead; ++i)
#pragma unroll
            for (int o = 0; o < 2; ++o)
#pragma unroll
              for (int u = 0; u < 2; ++u) gathered[i][o][u] = gathered[Blocks + i][o][u];

          if (m == 0) barrier_wait(empty + 8 * buffer, (chunk_index & plan.buffers) == 0);
          uint32_t keys[2][2][2];  // [octet][half, in the thread's order][pair]: turned by the token's offset in the tile
#pragma unroll
          for (int o = 0; o < 2; ++o)
#pragma unroll
            for (int u = 0; u < 2; ++u)
#pragma unroll
              for (int k = 0; k < 2; ++k) {
                const float x = static_cast<float>(sums[o][u][2 * k]), y = static_cast<float>(sums[o][u][2 * k + 1]);
                const float c = turn_c[o][u][k], s = turn_s[o][u][k];
                keys[o][u][k] = packed(x * c - y * s, y * c + x * s);
              }
          float products[4] = {0, 0, 0, 0};
#pragma unroll
          for (int u = 0; u < 2; ++u) {
            const uint32_t b0 = packed(query_x[u][0], query_y[u][0]), b1 = packed(query_x[u][1], query_y[u][1]);
            const auto key = [&](int o, int k) { return !kTwice && parity ? keys[o][1 - u][k] : keys[o][u][k]; };
            const uint32_t a0 = key(0, 0), a1 = key(1, 0), a2 = key(0, 1), a3 = key(1, 1);
            asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                : "+f"(products[0]), "+f"(products[1]), "+f"(products[2]), "+f"(products[3])
                : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
          }
#pragma unroll
          for (int u = 0; u < 2; ++u)
#pragma unroll
            for (int k = 0; k < 2; ++k) {
              const float x = query_x[u][k], y = query_y[u][k];
              query_x[u][k] = x * step_c[u][k] + y * step_s[u][k];
              query_y[u][k] = y * step_c[u][k] - x * step_s[u][k];
            }
          const auto store = [&](uint32_t to, uint32_t barrier) {
            if constexpr (kTwice) {
              const float first = stores_upper ? products[2] : products[0], second = stores_upper ? products[3] : products[1];
              store_remote(to, first * scale_0, second * scale_1, barrier);
            } else if constexpr (Lanes == 1) {
              if (t > 0) return;
              store_remote(to, products[0] * scale_0, barrier);
              store_remote(to + 8 * Lanes * 4, products[2] * scale_0, barrier);
            } else {
              store_remote(to, products[0] * scale_0, products[1] * scale_1, barrier);
              store_remote(to + 8 * Lanes * 4, products[2] * scale_0, products[3] * scale_1, barrier);
            }
          };
          store(targets[m] + buffer * buffer_bytes, remote(full + 8 * buffer, owners >> (8 * m) & 0xff));
          if constexpr (!Fast) {  // fast: one way
#pragma unroll 1
            for (int way = 1; way < plan.ways; ++way) {
              const int tile = m * kKeyWarps + warp, other = tile % plan.owners + way * plan.owners;
              const int place = (buffer * plan.cluster + rank) * plan.own_tiles + tile / plan.owners;
              store(remote(shared_address(shared.scores) + ((place * kTile + stored_token) * Lanes + stored_head) * 4, other),
                    remote(shared.full + 8 * buffer, other));
            }
          }
        }
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
          for (int o = 0; o < 2; ++o)
#pragma unroll
            for (int j = 0; j < kPacked; ++j) codes[m][o][j] = next_codes[m][o][j];
      }
    }
    cursor = unpark(parked);
    if (cursor.done()) break;
  }
}

#endif

}  // namespace gsrq::cuda::decoding
