// Scores of coded keys: one warp, two tiles of 16 tokens at a time, one slice of the head's dims. docs/cuda.md.
#pragma once

#include "decode_cluster.cuh"

namespace gsrq::cuda::decoding {

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

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
    const uint32_t m = static_cast<uint8_t>(scale.multipliers[i * kBlockStages + t]);
    low[i] = g < 4 ? m << (8 * g) : 0;
    high[i] = g < 4 ? 0 : m << (8 * (g - 4));
  }

  // A gathered vector of 16 bytes, half of a codeword's slice, fills the fragment of one product: of its four words two
  // are the row of the token, two the row 8 below. A thread gets two RoPE pairs of the half: near(t) and near(t) + 2.
  // Rows of odd g gather the halves in the other order, so that no two threads of a phase meet in a bank.
  const int near = t < 2 ? t : t + 2;
  float turn_c[2][2][2], turn_s[2][2][2];  // [octet of tokens][half, in the thread's order][pair]
#pragma unroll
  for (int o = 0; o < 2; ++o)
#pragma unroll
    for (int u = 0; u < 2; ++u)
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int p = slice * 16 + (u ^ parity) * 8 + near + 2 * k;
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
  float step_c[2][2], step_s[2][2];  // [half, in the slice's order][pair]
#pragma unroll
  for (int u = 0; u < 2; ++u)
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int p = slice * 16 + u * 8 + near + 2 * k;
      const int64_t at = min(kStride, layer.positions - 1);
      step_c[u][k] = p < half ? layer.cos[at * half + p] * __frcp_rn(layer.cos[p]) : 1.0f;
      step_s[u][k] = p < half ? layer.sin[at * half + p] * __frcp_rn(layer.cos[p]) : 0.0f;
    }

  int words = t * 32 + parity * 16, byte_of_word = 0x4440 | t, token_in_chunk = warp * kTile + g;
  keep(words);
  keep(byte_of_word);
  keep(token_in_chunk);
#pragma unroll
  for (int i = 0; i < Blocks; ++i) {
    keep(low[i]);
    keep(high[i]);
  }
  // Rarely needed values wait in shared memory, which is nearer than spilled registers: where the scores of the warp's two
  // tiles go, in their owners' memory, and by what they are multiplied.
  if (lane < 2) {
    const int tile = lane * kKeyWarps + warp, owner = tile % plan.owners, place = tile / plan.owners;
    shared.targets[warp * 2 + lane] =
        make_uint4(remote(shared_address(shared.scores) + (rank * plan.own_tiles + place) * kTile * Lanes * 4, owner),
                   remote(shared.full, owner), plan.cluster * plan.own_tiles * kTile * Lanes * 4, 0);
  }
  __syncwarp();
  int loaded = -1;
  uint32_t chunk_index = 0;

  for (; !cursor.done(); cursor.next(layer, call)) {
    const int kv_head = cursor.vhead / plan.parts, part = cursor.vhead % plan.parts;
    const Range range = coded_range(layer, call, cursor.row);
    if (kv_head != loaded) {
      sync_warps<kKeyThreads>(1);
      const uint4* from = reinterpret_cast<const uint4*>(
          constants.words + (static_cast<int64_t>(kv_head) * plan.cluster + rank) * Blocks * kBlockBytes);
      uint4* to = reinterpret_cast<uint4*>(shared_memory);
#pragma unroll 8
      for (int i = thread; i < Blocks * kBlockBytes / 16; i += kKeyThreads) to[i] = from[i];
      loaded = kv_head;
      sync_warps<kKeyThreads>(1);
    }
    const int group_byte = static_cast<int>(static_cast<int64_t>(kv_head) * layer.head_dim / layer.keys.width) *
                           layer.keys.stages;
    const int first_byte = group_byte + first_block * kBlockStages, last_byte = group_byte + layer.keys.stages;

    // The queries: head g's pairs of the slice, turned to the new token's position and back by a tile's first token.
    const int head = kv_head * plan.group + part * plan.part_heads + g;
    const bool real = g < plan.part_heads && part * plan.part_heads + g < plan.group;
    float query_x[2][2], query_y[2][2], query_scale = 0;
    const auto anchor = [&](int chunk) {
      const int64_t position = min(call.past_lengths[cursor.row], static_cast<int64_t>(layer.positions) - 1);
      const int64_t base = min(range.first + chunk * kChunk + warp * kTile, layer.positions - 1);
      float most = 0;
#pragma unroll
      for (int u = 0; u < 2; ++u)
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const int p = slice * 16 + u * 8 + near + 2 * k;
          int e0, e1;
          pair_elements(layer, p, &e0, &e1);
          float x = 0, y = 0;
          if (real) {
            const int64_t at = (static_cast<int64_t>(cursor.row) * layer.heads + head) * layer.head_dim;
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
      query_scale = most * unit * layer.scale * (layer.softcap > 0 ? 1.0f : kLog2e);
    };

    anchor(cursor.first);
    if (t == 0) shared.scales[warp * 8 + g] = query_scale;
    __syncwarp();

    uint32_t codes[2][2][Blocks], coming[2][2][Blocks];  // [tile][octet]
    const int first_row = range.first - layer.sinks;
    const int8_t* linear = call.key_codes + (cursor.row * call.capacity + first_row) * bytes;
    if constexpr (Fast) linear += first_byte;
    int last_token = range.count - 1;
    keep(linear);
    keep(last_token);
    const auto fetch = [&](int chunk) {
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int o = 0; o < 2; ++o) {
          const int i = min(chunk * kChunk + token_in_chunk + m * kStride + 8 * o, last_token);
          if constexpr (Fast) {
            const uint64_t at = static_cast<uint64_t>(static_cast<uint32_t>(i)) * static_cast<uint32_t>(bytes);
            load_codes<Blocks, true>(coming[m][o], linear + at, 0, 0);
          } else {
            const int8_t* row = call.key_codes + row_of(call, cursor.row, first_row + i) * bytes;
            load_codes<Blocks, false>(coming[m][o], row, first_byte, last_byte);
          }
        }
    };
    fetch(cursor.first);

    for (int chunk = cursor.first; chunk < cursor.stop; ++chunk, ++chunk_index) {
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int o = 0; o < 2; ++o)
#pragma unroll
          for (int i = 0; i < Blocks; ++i) codes[m][o][i] = coming[m][o][i];
      if (chunk + 1 < cursor.stop) fetch(chunk + 1);

      int sums[2][2][2][4];  // [tile][octet][half]
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int o = 0; o < 2; ++o)
#pragma unroll
          for (int u = 0; u < 2; ++u)
#pragma unroll
            for (int k = 0; k < 4; ++k) sums[m][o][u][k] = kBias;
#pragma unroll
      for (int i = 0; i < Blocks; ++i) {
        uint4 gathered[2][2][2];
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
          for (int o = 0; o < 2; ++o) {
            const int at = i * kBlockBytes + static_cast<int>(__byte_perm(codes[m][o][i], 0, byte_of_word)) * 128 + words;
            gathered[m][o][0] = *reinterpret_cast<const uint4*>(shared_memory + at);
            gathered[m][o][1] = *reinterpret_cast<const uint4*>(shared_memory + (at ^ 16));
          }
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
          for (int o = 0; o < 2; ++o)
#pragma unroll
            for (int u = 0; u < 2; ++u) {
              const uint4 v = gathered[m][o][u];
              mma_int8(sums[m][o][u], v.x, v.y, v.z, v.w, low[i], high[i]);
            }
      }

      const uint32_t buffer = chunk_index % kBuffers;
      barrier_wait(shared.empty + 8 * buffer, (chunk_index / kBuffers & 1) ^ 1);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        uint32_t keys[2][2][2];  // [octet][half, in the thread's order][pair]: turned by the token's offset in the tile
#pragma unroll
        for (int o = 0; o < 2; ++o)
#pragma unroll
          for (int u = 0; u < 2; ++u)
#pragma unroll
            for (int k = 0; k < 2; ++k) {
              const float x = __int_as_float(sums[m][o][u][2 * k]) - kBiasValue,
                          y = __int_as_float(sums[m][o][u][2 * k + 1]) - kBiasValue;
              const float c = turn_c[o][u][k], s = turn_s[o][u][k];
              keys[o][u][k] = packed(x * c - y * s, y * c + x * s);
            }
        float products[4] = {0, 0, 0, 0};
#pragma unroll
        for (int u = 0; u < 2; ++u) {
          const uint32_t b0 = packed(query_x[u][0], query_y[u][0]), b1 = packed(query_x[u][1], query_y[u][1]);
          const uint32_t a0 = parity ? keys[0][1 - u][0] : keys[0][u][0], a1 = parity ? keys[1][1 - u][0] : keys[1][u][0];
          const uint32_t a2 = parity ? keys[0][1 - u][1] : keys[0][u][1], a3 = parity ? keys[1][1 - u][1] : keys[1][u][1];
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
        if (2 * t < Lanes) {
          const uint4 target = shared.targets[warp * 2 + m];
          // The products' columns of a thread are heads 2 t and 2 t + 1.
          const float2 scale = *reinterpret_cast<const float2*>(shared.scales + warp * 8 + 2 * t);
          uint32_t me;
          asm volatile("mov.u32 %0, %%laneid;" : "=r"(me));  // again, rather than from a spilled register
          uint32_t to = target.x + buffer * target.z + (me / 4 * Lanes + 2 * (me % 4)) * 4, barrier = target.y + 8 * buffer;
#pragma unroll 1
          for (int way = 0;;) {
            if constexpr (Lanes == 1) {
              store_remote(to, products[0] * scale.x, barrier);
              store_remote(to + 8 * Lanes * 4, products[2] * scale.x, barrier);
            } else {
              store_remote(to, products[0] * scale.x, products[1] * scale.y, barrier);
              store_remote(to + 8 * Lanes * 4, products[2] * scale.x, products[3] * scale.y, barrier);
            }
            if (++way == plan.ways) break;
            const int tile = m * kKeyWarps + warp, other = tile % plan.owners + way * plan.owners;
            const int place = (buffer * plan.cluster + rank) * plan.own_tiles + tile / plan.owners;
            to = remote(shared_address(shared.scores) + ((place * kTile + g) * Lanes + 2 * t) * 4, other);
            barrier = remote(shared.full + 8 * buffer, other);
          }
        }
      }
      // Rounding errors of the turns must not add up.
      if (chunk_index % kAnchorChunks == kAnchorChunks - 1 && chunk + 1 < cursor.stop) anchor(chunk + 1);
    }
  }
}

#endif

}  // namespace gsrq::cuda::decoding
