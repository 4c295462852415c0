// The end of a decode: bins times the value codebook, exact tokens, and the sum of both.
#pragma once

#include "decode_common.cuh"

namespace gsrq::cuda::decoding {

// Bytes of the parts of Memory that depend on it: blocks of 32 exact tokens that a row can have.
int exact_splits(const gsrq_layer& layer);

// Sums of a value sub-vector that finish() adds: some of its stages each, or of one stage some codewords.
int value_parts(const gsrq_layer& layer, const gsrq_call& call, const DecodePlan& plan, int vheads);

// How the coded tokens were cut: into a Line of stretches for `owners` clusters or blocks; any: false where no
// call of this size has coded tokens; even, lead: line_of's; by_slot: a way's bins lie [slot][codeword][lane], not
// [codeword][slot][lane]. The launch before also leaves Memory::owners.
struct Stretches {
  int vheads, owners, even, lead;
  bool any, by_slot;
};

// Launches both kernels, behind the one that filled bins and state. with_exact: exact tokens are still to be attended to.
int combine(const gsrq_layer& layer, const gsrq_call& call, const DecodePlan& plan, const Memory& memory,
            const Stretches& coded, bool with_exact, cudaStream_t stream);

}  // namespace gsrq::cuda::decoding
