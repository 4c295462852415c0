// How a layer's decode is cut over a thread-block cluster: plain arithmetic, the same on host and device.
#pragma once

#include <cstdint>

#include "gsrq/cuda/gsrq_cuda.h"
#include "gsrq/layout.h"

namespace gsrq::cuda {

constexpr int kCodewords = GSRQ_CODEBOOK_SIZE;
constexpr int kTile = 16;       // tokens of a tensor-core tile
constexpr int kKeyWarps = 8;    // score tokens, two tiles a chunk each
constexpr int kValueWarps = 8;  // turn scores into weights and add them into bins
constexpr int kChunkTiles = 2 * kKeyWarps;
constexpr int kNextTile = kKeyWarps * kTile;  // tokens from one tile of a key warp to its next
constexpr int kChunk = kChunkTiles * kTile;  // tokens that are scored together
constexpr int kMostBuffers = 8;  // chunks whose scores may be under way: keys go on while values end an item
constexpr int kDecodeThreads = 32 * (kKeyWarps + kValueWarps);
constexpr int kSliceDims = 32;             // dims of a key slice: 16 RoPE pairs
constexpr int kBlockStages = 4;            // stages of a slice that lie in one row of 128 bytes
constexpr int kBlockBytes = kCodewords * kBlockStages * kSliceDims;
constexpr int kMostBlocks = 6, kMostSlots = 32, kMostCluster = 16;
// Of a CTA with so many blocks, the stage that lies in a slot of a block. A thread gathers one slot of all blocks: of four
// blocks its codes are one word.
__host__ __device__ constexpr int stage_of(int blocks, int block, int slot) {
  return blocks == 4 ? slot * 4 + block : block * kBlockStages + slot;
}
constexpr int kExponentSpread = 6;  // key stages are multiplied by up to 2^6 in int8
constexpr int kSharedLimit = 227 * 1024;

// For scores, cluster rank = (plane * splits + split) * slices + slice: a CTA scores its slice of the dims over its blocks
// of stages. For values, rank = way * owners + owner: it weighs tile t of a chunk where t % owners = owner, and bins the
// weights for its way's slots; slot v is byte v of a KV head's value codes.
struct DecodePlan {
  int head_dim, slices, planes, splits, cluster;
  int blocks;                // of four key stages in a CTA
  int all_blocks;            // of all key stages
  int slots, slots_per_cta;  // value code bytes of a head; those of a way
  int ways, owners;
  int width;                 // dims of the head that a slot contributes to
  int group;                 // query heads a KV head
  int parts, part_heads;     // query heads are decoded in parts of part_heads
  int lanes;                 // part_heads rounded up to 1, 4 or 8
  int own_tiles;             // most of an owner in a chunk
  int stride;                // bins of a codeword: lanes times a power of two of slots
  int buffers;               // chunks whose scores may be under way: kMostBuffers, or half of it where memory is short
  int shared_bytes;

  __host__ __device__ int bins() const { return kCodewords * stride; }
  // Tiles of a chunk that an owner weighs.
  __host__ __device__ int tiles_of(int owner) const { return (kChunkTiles - owner + owners - 1) / owners; }
};

inline int decode_shared_bytes(const DecodePlan& p) {
  return p.blocks * kBlockBytes + p.bins() * 4 + p.buffers * p.cluster * p.own_tiles * kTile * p.lanes * 4 + 1024 +
         2 * p.cluster * p.lanes * 8;
}

// False where the fast decode does not apply.
inline bool make_decode_plan(const gsrq_layer& layer, DecodePlan* out) {
  const int d = layer.head_dim;
  if (d % kSliceDims != 0 || layer.keys.width % d != 0 || layer.keys.planes < 1 || layer.keys.planes > 2) return false;
  if (!layer.geometric) return false;
  DecodePlan p{};
  p.head_dim = d;
  p.slices = d / kSliceDims;
  p.planes = layer.keys.planes;
  p.width = layer.values.width < d ? layer.values.width : d;
  if (p.width % 8 != 0) return false;
  p.slots = layer.values.stages * (d / p.width);
  p.group = layer.heads / layer.kv_heads;
  p.all_blocks = (layer.keys.stages + kBlockStages - 1) / kBlockStages;
  for (p.parts = 1; p.parts <= p.group; ++p.parts) {
    p.part_heads = (p.group + p.parts - 1) / p.parts;
    if (p.part_heads > 8) continue;
    p.lanes = p.part_heads == 1 ? 1 : p.part_heads <= 4 ? 4 : 8;
    for (p.splits = 1; p.slices * p.planes * p.splits <= kMostCluster; ++p.splits) {
      p.cluster = p.slices * p.planes * p.splits;
      p.blocks = (p.all_blocks + p.splits - 1) / p.splits;
      if (p.blocks == 5) p.blocks = 6;  // kernels exist for 1, 2, 3, 4 and 6
      if (p.blocks > kMostBlocks) continue;
      for (p.ways = 1; p.ways <= p.cluster; ++p.ways) {
        if (p.cluster % p.ways != 0) continue;
        p.owners = p.cluster / p.ways;
        p.own_tiles = (kChunkTiles + p.owners - 1) / p.owners;
        p.slots_per_cta = (p.slots + p.ways - 1) / p.ways;
        if (p.slots_per_cta > kMostSlots) continue;
        p.stride = p.lanes == 8 ? 64 : 32;  // kernels exist for 32 bins of one head, 32 or 64 of four, 64 of eight
        while (p.stride < p.slots_per_cta * p.lanes) p.stride *= 2;
        if (p.stride > (p.lanes == 1 ? 32 : 64)) continue;
        p.buffers = kMostBuffers;
        if (decode_shared_bytes(p) > kSharedLimit) p.buffers = kMostBuffers / 2;
        p.shared_bytes = decode_shared_bytes(p);
        if (p.shared_bytes > kSharedLimit) continue;
        *out = p;
        return true;
      }
    }
  }
  return false;
}

}  // namespace gsrq::cuda
