// What the files of clustering share: the codewords' float16 forms and the shares of the workspace.
#pragma once

#include "internal.cuh"

namespace gsrq::cuda {

constexpr int kClusters = 256;
constexpr int kMostClusterWidth = 512;
constexpr int kClusterDepth = 32;  // elements of a tile of codewords in shared memory; widths are padded to it
constexpr int kLeastTileRows = 32;
constexpr int kRun = 1024;         // rows that a warp sorts
constexpr int kPiece = 256;        // members of a cluster that a thread block sums
constexpr float kTiny = 1e-12f;    // as TINY of codec/cluster.py

inline int64_t parts_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

inline int32_t padded_width(const gsrq_clustering& of) {
  return static_cast<int32_t>(parts_of(of.width, kClusterDepth)) * kClusterDepth;
}

// Codeword k is scale_k (high + low), scale_k a power of two above its largest element. Its score is
// <x, high + low> * factor - norm.
struct WordForms {
  __half *high, *low;      // [G, 256, padded]
  float *factors, *norms;  // [G, 256]: 2 scale and ||c||^2, or scale and 0
};

struct AssignShare {
  WordForms words;
  double* partial;  // [G, tiles]: inertia

  AssignShare(const gsrq_clustering& of, Arena& workspace) {
    const int64_t count = static_cast<int64_t>(of.groups) * kClusters;
    words.high = workspace.take<__half>(count * padded_width(of));
    words.low = workspace.take<__half>(count * padded_width(of));
    words.factors = workspace.take<float>(count);
    words.norms = workspace.take<float>(count);
    partial = workspace.take<double>(of.groups * parts_of(of.rows, kLeastTileRows));
  }
};

// Rows sorted by code; each cluster's members are summed in pieces.
struct UpdateShare {
  int64_t runs, pieces;  // of a group; pieces: at most
  int32_t* offsets;      // [G, runs, 256]: of a code in a run, then where its first row goes
  int32_t* order;        // [G, rows]
  int32_t* starts;       // [G, 257]: of a cluster in order
  int32_t* first_piece;  // [G, 257]
  float* sums;           // [G, pieces, 2, width]: of w x and of w x / ||x||
  float* weights;        // [G, pieces]

  UpdateShare(const gsrq_clustering& of, Arena& workspace) {
    runs = parts_of(of.rows, kRun);
    pieces = of.rows / kPiece + kClusters;
    offsets = workspace.take<int32_t>(of.groups * runs * kClusters);
    order = workspace.take<int32_t>(of.groups * of.rows);
    starts = workspace.take<int32_t>(of.groups * (kClusters + 1));
    first_piece = workspace.take<int32_t>(of.groups * (kClusters + 1));
    sums = workspace.take<float>(of.groups * pieces * 2 * of.width);
    weights = workspace.take<float>(of.groups * pieces);
  }
};

int cluster_assign(const gsrq_clustering& of, const float* words, bool inner, uint8_t* codes, float* gains, double* inertia,
                   const AssignShare& share, cudaStream_t stream);
int cluster_update(const gsrq_clustering& of, int32_t form, const uint8_t* codes, const float* words, float* updated,
                   float* totals, const UpdateShare& share, cudaStream_t stream);

}  // namespace gsrq::cuda
