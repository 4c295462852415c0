"""torch operator gsrq::slot_attention: the coded cache over a server's flattened tokens and cache slots.

A server that rotates queries and keys before attention, and keeps a row of every cache for each running sequence
(its slot), calls this. What it rotated is turned back first: keys are coded before RoPE. The work is that of
gsrq::attention; caches are updated where they lie.
"""

from __future__ import annotations

from pathlib import Path

import torch

from gsrq_export.cuda.layer import CudaLayer
from gsrq_export.cuda.rows import ExactPages, Rows, RowsCall, Tokens
from gsrq_export.errors import GsrqError
from gsrq_export.hosting.layers import torch_layer
from gsrq_export.hosting.rows import attend_rows

CACHES = ("key_codes", "value_codes", "key_exact", "value_exact")


@torch.library.custom_op("gsrq::slot_attention", mutates_args=CACHES)
def slot_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    batch_info_host: torch.Tensor,
    seq_len: torch.Tensor,
    input_pos: torch.Tensor,
    slot_idx: torch.Tensor,
    cu_seqlen: torch.Tensor,
    key_codes: torch.Tensor,
    value_codes: torch.Tensor,
    key_exact: torch.Tensor,
    value_exact: torch.Tensor,
    artifact: str,
    layer: int,
) -> torch.Tensor:
    """Append the sequences' new tokens to their slots and attend.

    Args:
        query: [b, s, heads, head_dim], rotated; b * s tokens, sequence after sequence, those being prefilled first.
        key, value: [b, s, KV heads, head_dim], key rotated.
        batch_info_host: int on the CPU, as `sequences` reads it.
        seq_len: int [B or more], new tokens of each sequence.
        input_pos: int [B or more], tokens of each that are in the cache.
        slot_idx: int [B or more], its row of the caches.
        cu_seqlen: int [B or more], where its tokens begin.
        key_codes, value_codes: int8 [slots, tokens, code bytes]; how codes are ordered follows from their number of
            tokens, see gsrq_export.hosting.layers.with_code_order.
        key_exact, value_exact: [slots, KV heads, exact slots, head_dim].
        artifact: its directory; layer: counts layers that own a cache.
    Returns:
        of query's type and shape, zero for tokens past the last sequence's.
    Raises:
        GsrqError: shapes that are not the artifact's, or more tokens than a slot or the rotary table holds (on CUDA
            only what shapes say is checked: lengths lie on the device).
    """
    if query.ndim != 4 or key.ndim != 4:
        raise GsrqError(f"query has shape {list(query.shape)}", "give [b, s, heads, head_dim]")
    owner = torch_layer(Path(artifact), layer, int(query.shape[2]), query.device, int(key_codes.shape[1]))
    metadata = (batch_info_host, seq_len, input_pos, slot_idx, cu_seqlen)
    return attend_slots(owner, (query, key, value), metadata, (key_codes, value_codes, key_exact, value_exact))


def attend_slots(
    layer: CudaLayer,
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    metadata: tuple[torch.Tensor, ...],
    caches: tuple[torch.Tensor, ...],
) -> torch.Tensor:
    """`slot_attention` with its layer at hand; the tensors are that operator's, in its order."""
    query, key, value = qkv
    shape = layer.shape
    if tuple(key.shape[2:]) != (shape.kv_heads, shape.head_dim):
        raise GsrqError(
            f"keys have {key.shape[2]} KV heads of {key.shape[3]}, the artifact's layer {shape.kv_heads} of "
            f"{shape.head_dim}",
            "serve the artifact's own model on one GPU: its codebooks are over all KV heads",
        )
    batch_info_host, *of_sequences = metadata
    prefill, decode = sequences(batch_info_host)
    tokens = (query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1))
    output = torch.zeros_like(tokens[0], memory_format=torch.contiguous_format)
    for first, count in ((0, prefill), (prefill, decode)):
        if count:
            batch = [x[first : first + count].long() for x in of_sequences]
            # One token a sequence when decoding: nothing is read from the device, so CUDA graphs capture it.
            steps = int(batch[0].max()) if first == 0 and prefill else 1
            _run(layer, tokens, batch, caches, steps, output)
    return output.view(query.shape)


def sequences(batch_info_host: torch.Tensor) -> tuple[int, int]:
    """Sequences in prefill and those that decode one token, in the forms that AutoDeploy has had.

    Of 3 numbers: sequences in prefill, their tokens, sequences that decode. Of 12: sequences and tokens of prefill, of
    speculation and of decoding, and more.

    Raises:
        GsrqError: another form, or sequences that speculate: tokens are coded for good.
    """
    given = batch_info_host.tolist()
    if len(given) == 3:
        return given[0], given[2]
    if len(given) != 12:
        raise GsrqError(
            f"batch_info_host has {len(given)} numbers", "use a version with the interface of docs/deploy-trtllm.md"
        )
    if given[2]:
        raise GsrqError("AutoDeploy speculates: tokens could be taken back", "turn speculative decoding off")
    return given[0], given[4]


@slot_attention.register_fake
def _shape(query: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty_like(query)


def _run(
    layer: CudaLayer,
    tokens: Tokens,
    batch: list[torch.Tensor],
    caches: tuple[torch.Tensor, ...],
    steps: int,
    output: torch.Tensor,
) -> None:
    """Sequences of up to ``steps`` new tokens each; their outputs go into ``output`` [tokens, heads, head_dim]."""
    new, past, slots, starts = batch
    key_codes, value_codes, key_exact, value_exact = caches
    # A slot's codes are a page of their own, and so are its exact keys and values: all are updated where they lie.
    table = slots[:, None].int()
    for name, tensor in (("key_exact", key_exact), ("value_exact", value_exact)):
        if not tensor.is_contiguous():
            raise GsrqError(f"{name} has strides {list(tensor.stride())}", "allocate the slots densely")
    keys, values = (x.flatten(1).view(torch.int8) for x in (key_exact, value_exact))
    exact = ExactPages(keys, values, table, key_exact.dtype)
    rows = Rows(new, past, starts, steps)
    attend_rows(layer, RowsCall(tokens, rows, (key_codes, value_codes), table, exact, output))
