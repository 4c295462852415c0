"""torch operators gsrq::attention and gsrq::encode: torch.compile keeps them whole, CUDA graphs capture them.

On CUDA tensors the kernels run, on CPU tensors the reference. Both check everything before they touch the cache.
"""

from __future__ import annotations

from typing import Any

import torch

from gsrq_export.cache.reference import LayerCache, gsrq_attention
from gsrq_export.cuda.call import Call, check_vectors, encode_vectors
from gsrq_export.cuda.check import CallTensors, check_call, check_lengths
from gsrq_export.cuda.layer import CudaLayer, layer_of

CACHE = ("key_codes", "value_codes", "key_exact", "value_exact")


@torch.library.custom_op("gsrq::attention", mutates_args=CACHE, device_types="cuda")
def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    past_lengths: torch.Tensor,
    new_lengths: torch.Tensor,
    key_codes: torch.Tensor,
    value_codes: torch.Tensor,
    key_exact: torch.Tensor,
    value_exact: torch.Tensor,
    block_table: torch.Tensor | None,
    layer: int,
    max_total: int | None,
) -> torch.Tensor:
    """CudaLayer.__call__ as an operator. layer: CudaLayer.handle."""
    tensors = CallTensors(
        query, key, value, past_lengths, new_lengths, key_codes, value_codes, key_exact, value_exact, block_table
    )
    return Call(layer_of(layer), tensors, max_total).run()


@attention.register_kernel("cpu")
def _reference(*arguments: Any) -> torch.Tensor:
    *of_call, layer, max_total = arguments
    tensors, owner = CallTensors(*of_call), layer_of(layer)
    check_lengths(owner.shape, tensors, check_call(owner.shape, tensors, max_total))
    return run_reference(owner, tensors)


@attention.register_fake
def _shape(query: torch.Tensor, *_: Any) -> torch.Tensor:
    batch, heads, steps, head_dim = query.shape
    return query.new_empty(batch, steps, heads, head_dim)


@torch.library.custom_op("gsrq::encode", mutates_args=(), device_types="cuda")
def encode(vectors: torch.Tensor, side: str, layer: int) -> torch.Tensor:
    """CudaLayer.encode as an operator. layer: CudaLayer.handle."""
    return encode_vectors(layer_of(layer), vectors, side)


@encode.register_kernel("cpu")
def _encode_reference(vectors: torch.Tensor, side: str, layer: int) -> torch.Tensor:
    owner = layer_of(layer)
    check_vectors(owner, vectors, side)
    book = owner.keys if side == "keys" else owner.values
    return book.encode(vectors, owner.config.beam)


@encode.register_fake
def _codes_shape(vectors: torch.Tensor, side: str, layer: int) -> torch.Tensor:
    shape = layer_of(layer).shape
    code_bytes = shape.key_bytes if side == "keys" else shape.value_bytes
    return vectors.new_empty((*vectors.shape[:-1], code_bytes), dtype=torch.int8)


def run_reference(layer: CudaLayer, call: CallTensors) -> torch.Tensor:
    """The operator by gsrq_attention, the cache updated in place and coded rows read and written through the table.

    Pages one after another are a linear cache in either order of codes: by head, a page is whole tiles.
    """
    batch, heads, steps, head_dim = call.query.shape
    if batch == 0 or steps == 0:
        return call.query.new_empty(batch, steps, heads, head_dim)
    codes = (call.key_codes, call.value_codes)
    table = call.block_table
    if table is not None:
        index = table.long().clamp(0, codes[0].shape[0] - 1)  # entries that are not used may be anything
        codes = (codes[0][index].flatten(1, 2), codes[1][index].flatten(1, 2))
    output, after = gsrq_attention(
        call.query.float(),
        call.key,
        call.value,
        layer.cos,
        layer.sin,
        call.past_lengths,
        call.new_lengths,
        LayerCache(*codes, call.key_exact, call.value_exact),
        layer.keys,
        layer.values,
        layer.config,
    )
    call.key_exact.copy_(after.key_exact)
    call.value_exact.copy_(after.value_exact)
    for stored, fresh in ((call.key_codes, after.key_codes), (call.value_codes, after.value_codes)):
        if table is None:
            stored.copy_(fresh)
            continue
        page = stored.shape[1]
        for b, total in enumerate((call.past_lengths + call.new_lengths).tolist()):
            used = -(-layer.shape.rule.coded(total) // page)
            stored[table[b, :used].long()] = fresh[b, : used * page].reshape(used, page, stored.shape[2])
    return output.to(call.query.dtype)
