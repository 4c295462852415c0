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

// The compiler orders instructions freely within a block that no branch parts: a loop that is never run (never is 0, which the
// compiler does not know) keeps those before it ahead of those after it.
__device__ inline void end_of_block(uint32_t& never) {
  asm volatile(
      "{\n\t.reg .pred p;\n\tagain%=: setp.ne.u32 p, %0, 0;\n\t@p add.u32 %0, %0, 1;\n\t@p bra again%=;\n\t}" : "+r"(never));
}

template <int Blocks, int Lanes, Reading How>
__device__ void score_keys(const gsrq_layer& layer, const gsrq_call& call, const DecodePlan& plan, const Constants& constants,
                           const Shared& shared, Cursor cursor, uint32_t rank) {
  constexpr bool kFast = How != Reading::bytes, kPaged = How == Reading::words_of_pages;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
  const int slice = rank % plan.slices, part_of_stages = rank / plan.slices, split = part_of_stages % plan.splits;
  const int half = layer.half_rope, tile_bytes = kCodeTile * layer.keys.groups * layer.keys.stages;
  const int first_block = split * plan.blocks;

  // A head's slice of the codebook; the first comes while the constants below are read.
  const auto load_slice = [&](int kv_head) {
    if (thread > 0) return;
    constexpr uint32_t kBytes = Blocks * kBlockBytes;
    barrier_expect(shared.slice, kBytes);
    fence_bulk();
    const int64_t at = static_cast<int64_t>(kv_head) * plan.cluster + rank;
    copy_bulk(shared_memory, constants.words + at * kBytes, kBytes, shared.slice);
  };
  if (cursor.done()) return;
  int loaded = cursor.vhead / plan.parts, loads = 0;
  load_slice(loaded);

  const LanePlace place(Lanes, lane);
  constexpr bool kTwice = Lanes == 4;
  const LaneConstants mine = constants.lanes[rank * 32 + lane];
  uint32_t low[Blocks], high[Blocks];
#pragma unroll
  for (int i = 0; i < Blocks; ++i) {
    low[i] = mine.low[i];
    high[i] = mine.high[i];
  }
  // Row `row` of the rotary table for the thread's pairs, in the queries' order. Read without branches, so that all reads are
  // under way at once.
  struct Turns {
    float c[2][2], s[2][2];  // [half][pair]
  };
  const auto turns_of = [&](int64_t row) {
    Turns out;
    const int64_t at = min(row, static_cast<int64_t>(layer.positions) - 1) * half;
#pragma unroll
    for (int u = 0; u < 2; ++u)
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int p = place.pair(slice, u ^ place.swapped, k);
        out.c[u][k] = p < half ? __ldg(layer.cos + at + p) : 1.0f;
        out.s[u][k] = p < half ? __ldg(layer.sin + at + p) : 0.0f;
      }
    return out;
  };

  // Where a thread reads of codeword 0 of the first stages: the two halves in its order.
  uint32_t words = shared_address(shared_memory) + t * 32 + place.parity * 16, other_words = words ^ 16;
  uint32_t byte_pair = t | (4 + t) << 4;
  keep(words);
  keep(other_words);
  keep(byte_pair);
#pragma unroll
  for (int i = 0; i < Blocks; ++i) {
    keep(low[i]);
    keep(high[i]);
  }
  // Where the scores of the warp's tiles go. Fast: one CTA weighs them all, of the first tile they lie here. Of four heads a
  // thread has heads 2 (t % 2) and + 1 of token g or g + 8, else heads 2 t and 2 t + 1 of both.
  const bool stores_upper = (t >= 2) != (place.parity != 0);
  const int stored_token = g + (kTwice && stores_upper ? 8 : 0), stored_head = kTwice ? 2 * t % 4 : 2 * t;
  const auto score_address = [&](int tile, uint32_t buffer) {
    const int place = (buffer * plan.cluster + rank) * plan.own_tiles + tile / plan.owners;
    return shared_address(shared.scores) + ((place * kTile + stored_token) * Lanes + stored_head) * 4;
  };
  uint32_t first_target = remote(score_address(warp, 0), warp % plan.owners);
  uint32_t owners_full = remote(shared.full, warp % plan.owners);
  uint32_t buffer_bytes = plan.cluster * plan.own_tiles * kTile * Lanes * 4, empty = shared.empty;
  uint32_t next_tile_bytes = kKeyWarps / plan.owners * kTile * Lanes * 4;
  keep(first_target);
  keep(owners_full);
  keep(buffer_bytes);
  keep(empty);
  uint32_t never = plan.cluster >> 16;  // 0
  constexpr bool kOneWord = Blocks == 4;  // stage_of
  constexpr int kWords = kOneWord ? 1 : Blocks, kPacked = (Blocks + 3) / 4, kAhead = Blocks == 6 ? 3 : Blocks;
  static_assert(Blocks % kAhead == 0, "a block is gathered into the same registers in each tile");
  uint32_t chunk_index = 0;

  // [tile][octet]: words of codes under way, a chunk ahead of where they are looked up: while a chunk's first tile is
  // multiplied, the second one's are, then the next chunk's first.
  uint32_t coming[2][2][kWords];
  uint4 gathered[kAhead][2][2];  // [block][octet][half, in the thread's order]: kAhead blocks ahead, of this tile or the next
  const auto pack = [&](uint32_t (&out)[2][kPacked], const uint32_t (&from)[2][kWords]) {  // byte t of each word
#pragma unroll
    for (int o = 0; o < 2; ++o) {
      const auto word = [&](int i) { return i < kWords ? from[o][i < kWords ? i : 0] : 0u; };
#pragma unroll
      for (int j = 0; j < kPacked; ++j)
        out[o][j] = kOneWord ? from[o][0]
                             : __byte_perm(__byte_perm(word(4 * j), word(4 * j + 1), byte_pair),
                                           __byte_perm(word(4 * j + 2), word(4 * j + 3), byte_pair), 0x5410);
    }
  };
  const auto gather = [&](uint4 (&out)[2][2], const uint32_t (&from)[2][kPacked], int i) {
#pragma unroll
    for (int o = 0; o < 2; ++o) {
      const uint32_t row = __byte_perm(from[o][i / 4], 0, 0x4440 | i % 4) * (kBlockStages * kSliceDims);
      out[o][kTwice ? o : 0] = load_shared(row + words + i * kBlockBytes);
      out[o][kTwice ? 1 - o : 1] = load_shared(row + other_words + i * kBlockBytes);
    }
  };

  // Codes of an item's tokens. Those of the next item are fetched before this one ends. A thread's tokens are the g-th of
  // octets, and so lie tile_bytes apart in either order of codes.
  const int first_byte = first_block * kBlockStages + (kOneWord ? 4 * t : 0);
  static_assert(kTile == 2 * kCodeTile, "a thread has a token of two octets of a tile");
  struct Source {
    // Words: of the row's octet 0 (of pages: the tensor's), where the CTA's stages, or the thread's, begin; else the tensor's row 0.
    const int8_t* codes;
    int last_octet, row, first_row, last_token, run, entries;
  };
  const auto source_of = [&](const Cursor& of) {
    const Range range = coded_range(layer, call, of.row);
    const CodePlaces places = code_places(layer, layer.keys, of.vhead / plan.parts);
    Source out;
    out.row = of.row;
    out.first_row = range.first - layer.sinks;
    out.last_token = range.count - 1;
    out.last_octet = max(out.last_token - g, 0) / kCodeTile;
    out.run = places.run;
    if constexpr (kPaged) out.entries = of.row * call.table_stride;
    const int64_t row = (kPaged ? 0 : of.row * call.capacity + out.first_row) + min(g, out.last_token);
    out.codes = call.key_codes + (kFast ? places.at(row) + first_byte : places.first);
    return out;
  };
  const auto first_octet = [&](int chunk) { return chunk * (kChunk / kCodeTile) + warp * (kTile / kCodeTile); };  // of the warp
  // Of a tile the page, which is asked for a tile ahead of its codes.
  const Pages pages = kept_pages<kPaged>(call);
  const auto tile_octet = [&](const Source& source, int first, int tile, int o) {  // past the row: one of its last tokens
    return min(first + tile * (kNextTile / kCodeTile) + o, source.last_octet);
  };
  const auto page_of = [&](const Source& source, int first, int tile) {
    return kPaged ? pages.page(source.entries, tile_octet(source, first, tile, 0)) : 0;
  };
  const auto fetch = [&](uint32_t (&out)[2][kWords], const Source& source, int first, int tile, int page) {
    const int shift = kPaged ? pages.shift(page, tile_octet(source, first, tile, 0)) : 0;
#pragma unroll
    for (int o = 0; o < 2; ++o) {
      const int octet = tile_octet(source, first, tile, o);
      if constexpr (kFast) {
        const uint64_t at = static_cast<uint64_t>(static_cast<uint32_t>(octet + shift)) * static_cast<uint32_t>(tile_bytes);
        load_codes<kWords, true>(out[o], source.codes + at, 0, 0);
      } else {
        const int i = min(octet * kCodeTile + g, source.last_token);
        const CodePlaces places{0, tile_bytes, source.run};
        load_codes<kWords, false>(out[o], source.codes + places.at(row_of(call, source.row, source.first_row + i)), first_byte,
                                  layer.keys.stages);
      }
    }
  };

  Source source = source_of(cursor);
  const auto fetch_now = [&](uint32_t (&out)[2][kWords], const Source& source, int first, int tile) {
    fetch(out, source, first, tile, page_of(source, first, tile));
  };
  fetch_now(coming[1], source, first_octet(cursor.first), 1);
  fetch_now(coming[0], source, first_octet(cursor.first + 1), 0);  // again below if that is the next item's
  uint32_t codes[2][kPacked];  // of the tile that is multiplied
  for (;;) {
    Cursor after = cursor;
    after.next(layer, call);
    Source next = after.done() ? source : source_of(after);  // its first chunk is chunk 0
    volatile Parked parked;
    park(parked, after);
    const int kv_head = cursor.vhead / plan.parts, part = cursor.vhead % plan.parts;
    if (kv_head != loaded || chunk_index == 0) {  // another slice: what was gathered for the first tile is of no use
      if (kv_head != loaded) {
        sync_warps<kKeyThreads>(1);
        load_slice(loaded = kv_head);
        ++loads;
      }
      uint32_t first_words[2][kWords];
      fetch_now(first_words, source, first_octet(cursor.first), 0);
      pack(codes, first_words);
      barrier_wait(shared.slice, loads & 1);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) gather(gathered[i], codes, i);
    }
    if (cursor.stop - cursor.first == 1) fetch_now(coming[0], next, first_octet(0), 0);
    const int first_token = layer.sinks + source.first_row;
    // In local memory until it is needed: registers are short.
    const int8_t* volatile next_codes_at = next.codes;
    volatile int next_last = next.last_octet, next_entries;
    if constexpr (kPaged) next_entries = next.entries;

    // The queries: head g's pairs of the slice, turned to the new token's position and back by a tile's first token.
    const int of_part = kTwice ? g % 4 : g, head = kv_head * plan.group + part * plan.part_heads + of_part;
    const bool real = of_part < plan.part_heads && part * plan.part_heads + of_part < plan.group;
    float query_x[2][2], query_y[2][2], scale_0 = 0, scale_1 = 0;  // scales: of heads 2 t and 2 t + 1
    const auto anchor = [&](int chunk) {
      int row = cursor.row;
      keep(row);  // addresses are not worth registers of the loop
      const Turns base = turns_of(first_token + chunk * kChunk + warp * kTile);
      const Turns here = turns_of(call.past_lengths[row]);
      const int64_t at = (static_cast<int64_t>(row) * layer.heads + (real ? head : 0)) * layer.head_dim;
#pragma unroll
      for (int u = 0; u < 2; ++u)
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          int e0, e1;
          pair_elements(layer, place.pair(slice, u ^ place.swapped, k), &e0, &e1);
          query_x[u][k] = load_any(call.query, at + e0, call.dtype);
          query_y[u][k] = load_any(call.query, at + e1, call.dtype);
        }
      float most = 0;
#pragma unroll
      for (int u = 0; u < 2; ++u)
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const float x = real ? query_x[u][k] : 0.0f, y = real ? query_y[u][k] : 0.0f;
          most = fmaxf(most, fmaxf(fabsf(x), fabsf(y)));
          const float turned_x = x * here.c[u][k] - y * here.s[u][k], turned_y = y * here.c[u][k] + x * here.s[u][k];
          query_x[u][k] = turned_x * base.c[u][k] + turned_y * base.s[u][k];
          query_y[u][k] = turned_y * base.c[u][k] - turned_x * base.s[u][k];
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
      const float query_scale = most * mine.unit * layer.scale * (layer.softcap > 0 ? 1.0f : kLog2e);
      scale_0 = __shfl_sync(~0u, query_scale, 8 * t);
      scale_1 = __shfl_sync(~0u, query_scale, 8 * t + 4);
    };

    // Of the chunk whose codes are fetched next the warp's first octet, and how many chunks are left of this item.
    int ahead = first_octet(cursor.first + 1), left_ahead = cursor.stop - cursor.first - 1;
    const auto go_on = [&] {
      source = next;
      source.codes = next_codes_at;
      source.last_octet = next_last;
      if constexpr (kPaged) source.entries = next_entries;
    };
    if (left_ahead == 0) {
      ahead = first_octet(0);
      go_on();
    }
    int page = page_of(source, ahead, 1);
#pragma unroll 1
    for (int chunk = cursor.first; chunk < cursor.stop; chunk += kAnchorChunks) {
      anchor(chunk);  // rounding errors of the turns must not add up
#pragma unroll 1
      for (int left = min(cursor.stop - chunk, kAnchorChunks); left > 0; --left, ++chunk_index) {
        const uint32_t buffer = chunk_index & (plan.buffers - 1), used_up = (chunk_index & plan.buffers) == 0;
        // Asked early, as the answer comes behind what is gathered.
        const bool is_empty = barrier_test(empty + 8 * buffer, used_up);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          uint32_t next_codes[2][kPacked];
          pack(next_codes, coming[1 - m]);
          int sums[2][2][4];  // [octet][half]
#pragma unroll
          for (int o = 0; o < 2; ++o)
#pragma unroll
            for (int u = 0; u < 2; ++u)
#pragma unroll
              for (int k = 0; k < 4; ++k) sums[o][u][k] = 0;
#pragma unroll
          for (int i = 0; i < Blocks; ++i) {
#pragma unroll
            for (int o = 0; o < 2; ++o)
#pragma unroll
              for (int u = 0; u < 2; ++u) {
                const uint4 v = gathered[i % kAhead][o][u];
                mma_int8(sums[o][u], v.x, v.y, v.z, v.w, low[i], high[i]);
              }
            const int next = i + kAhead;
            if (next < Blocks) gather(gathered[i % kAhead], codes, next);
            else gather(gathered[i % kAhead], next_codes, next - Blocks);
          }
#pragma unroll
          for (int o = 0; o < 2; ++o)
#pragma unroll
            for (int j = 0; j < kPacked; ++j) codes[o][j] = next_codes[o][j];
          fetch(coming[1 - m], source, ahead, 1 - m, page);
          if (m == 0) {
            ahead += kChunk / kCodeTile;
            if (--left_ahead == 0) {
              ahead = first_octet(0);
              go_on();
            }
          }
          page = page_of(source, ahead, m);
          if (m == 1) end_of_block(never);
          else if (!is_empty) barrier_wait(empty + 8 * buffer, used_up);
          uint32_t keys[2][2][2];  // [octet][half, in the thread's order][pair]: turned by the token's offset in the tile
#pragma unroll
          for (int o = 0; o < 2; ++o)
#pragma unroll
            for (int u = 0; u < 2; ++u)
#pragma unroll
              for (int k = 0; k < 2; ++k) {
                const float x = static_cast<float>(sums[o][u][2 * k]), y = static_cast<float>(sums[o][u][2 * k + 1]);
                const float c = mine.turn[o][u][k].x, s = mine.turn[o][u][k].y;
                keys[o][u][k] = packed(x * c - y * s, y * c + x * s);
              }
          float products[4] = {0, 0, 0, 0};
#pragma unroll
          for (int u = 0; u < 2; ++u) {
            const uint32_t b0 = packed(query_x[u][0], query_y[u][0]), b1 = packed(query_x[u][1], query_y[u][1]);
            const auto key = [&](int o, int k) { return !kTwice && place.parity ? keys[o][1 - u][k] : keys[o][u][k]; };
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
              query_x[u][k] = x * mine.step[u][k].x + y * mine.step[u][k].y;
              query_y[u][k] = y * mine.step[u][k].x - x * mine.step[u][k].y;
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
          if constexpr (kFast) {  // one way
            store(first_target + buffer * buffer_bytes + m * next_tile_bytes, owners_full + 8 * buffer);
          } else {
#pragma unroll 1
            for (int way = 0; way < plan.ways; ++way) {
              const int tile = m * kKeyWarps + warp, owner = tile % plan.owners + way * plan.owners;
              store(remote(score_address(tile, buffer), owner), remote(shared.full + 8 * buffer, owner));
            }
          }
          if (m == 0) end_of_block(never);
        }
      }
    }
    cursor = unpark(parked);
    if (cursor.done()) break;
  }
}

#endif

}  // namespace gsrq::cuda::decoding
