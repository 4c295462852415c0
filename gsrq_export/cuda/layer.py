"""A layer's constants on their device, ready for the kernels."""

from __future__ import annotations

import ctypes
import itertools
import weakref

import torch

from gsrq_export.cache.reference import AttentionConfig, LayerCache
from gsrq_export.codec.codebook import Codebook
from gsrq_export.cuda.check import CallTensors, LayerShape, check_call, check_lengths
from gsrq_export.cuda.library import INSPECT_SCRATCH, CodebookStruct, CudaLibrary, LayerStruct, load
from gsrq_export.errors import GsrqError

_LAYERS: weakref.WeakValueDictionary[int, CudaLayer] = weakref.WeakValueDictionary()
_HANDLES = itertools.count(1)


class CudaLayer:
    """Codebooks, rotary table and attributes of one layer; calls the operator with them.

    On a CUDA device the kernels run, on the CPU the torch reference. The operator takes the layer as an integer,
    ``handle``: what the kernels need of it on the host (which form the codebooks have, the exponents) would as a
    CPU tensor keep torch.compile from using CUDA graphs, and as numbers be guarded one by one. The operator
    finds the layer by it as long as the layer lives.

    Args:
        heads: query heads.
        head_dim: elements of a head.
        keys, values: the codebooks, over all KV heads.
        cos, sin: [positions, rope_dim / 2], the model's scaled cosine and sine.
        config: the operator's attributes.
        device: where the calls' tensors will lie.
    Raises:
        GsrqError: shapes that disagree, a layer that the kernels do not support, no library.

    Attributes:
        planes: 1 where every key codeword is an int8 times a power of two of its stage, else 2; 0 on the CPU.
        geometric: the rotary table's row j is j times a fixed rotation; None on the CPU.
    """

    def __init__(
        self,
        heads: int,
        head_dim: int,
        keys: Codebook,
        values: Codebook,
        cos: torch.Tensor,
        sin: torch.Tensor,
        config: AttentionConfig,
        device: torch.device | str = "cuda",
    ) -> None:
        device = torch.device(device)
        if device.type not in ("cuda", "cpu"):
            raise GsrqError(f"device {device} has no kernels", "use a CUDA device, or the CPU for the reference")
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        total = keys.groups * keys.width
        if head_dim < 2 or total % head_dim or values.groups * values.width != total:
            raise GsrqError(
                f"codebooks of {total} and {values.groups * values.width} elements with head_dim {head_dim}",
                "keys' and values' must both code all KV heads of a token",
            )
        kv_heads = total // head_dim
        if heads < 1 or heads % kv_heads:
            raise GsrqError(f"{heads} query heads on {kv_heads} KV heads", "heads must be a multiple of KV heads")
        if cos.ndim != 2 or cos.shape != sin.shape or cos.shape[0] < 1 or 2 * cos.shape[1] > head_dim:
            raise GsrqError(
                f"cos {list(cos.shape)} and sin {list(sin.shape)}",
                f"both must be [positions, rope_dim / 2] with rope_dim at most head_dim = {head_dim}",
            )
        self.config = config
        self.keys, self.values = keys.to(device), values.to(device)
        self.cos = cos.to(device, torch.float32).contiguous()
        self.sin = sin.to(device, torch.float32).contiguous()
        code_bytes = (keys.code_bytes, values.code_bytes)
        self.shape = LayerShape(
            heads, kv_heads, head_dim, int(cos.shape[0]), *code_bytes, config.rule, device, config.codes_by_head
        )
        self.planes = 0
        self.geometric: bool | None = None
        if device.type == "cuda":
            self._prepare()
        self.handle = next(_HANDLES)
        _LAYERS[self.handle] = self

    def _prepare(self) -> None:
        self.library: CudaLibrary = load()
        self.library.check_device(self.shape.device)
        rule, config = self.config.rule, self.config
        self._kept: list[torch.Tensor] = []  # the structure has their addresses
        self.struct = LayerStruct(
            heads=self.shape.heads,
            kv_heads=self.shape.kv_heads,
            head_dim=self.shape.head_dim,
            half_rope=self.cos.shape[1],
            positions=self.shape.positions,
            sinks=rule.sinks,
            window=rule.window,
            block=rule.block,
            beam=config.beam,
            sliding_window=config.sliding_window,
            rope_interleaved=config.rope_interleaved,
            exact_prefill=config.exact_prefill,
            codes_by_head=config.codes_by_head,
            scale=config.scale,
            softcap=config.softcap,
            cos=self.cos.data_ptr(),
            sin=self.sin.data_ptr(),
            keys=self._book(self.keys),
            values=self._book(self.values),
            key_center=self._center(),
        )
        self.pointer = ctypes.byref(self.struct)
        device = self.shape.device
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream(device)
            scratch = torch.empty(INSPECT_SCRATCH, dtype=torch.uint8, device=device)
            self.library.run("inspect", self.pointer, scratch.data_ptr(), stream.cuda_stream)
            size = self.library.bytes("prepared", self.pointer)
            self.prepared = torch.empty(max(size, 1), dtype=torch.uint8, device=device)
            self.library.run("prepare", self.pointer, self.prepared.data_ptr(), stream.cuda_stream)
            stream.synchronize()  # later calls may come on other streams
        self.planes = int(self.struct.keys.planes)
        self.geometric = bool(self.struct.geometric)

    def _book(self, book: Codebook) -> CodebookStruct:
        words, transform = book.codewords.contiguous(), book.transform.contiguous()
        self._kept += [words, transform]
        sizes = {"groups": book.groups, "stages": book.stages, "width": book.width}
        return CodebookStruct(**sizes, codewords=words.data_ptr(), transform=transform.data_ptr())

    def _center(self) -> int | None:
        """Address of the keys' center; None where keys are coded before RoPE."""
        center = self.keys.center
        if center is None:
            return None
        self._kept.append(center.contiguous())
        return self._kept[-1].data_ptr()

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        past_lengths: torch.Tensor,
        new_lengths: torch.Tensor,
        cache: LayerCache,
        block_table: torch.Tensor | None = None,
        max_total: int | None = None,
    ) -> torch.Tensor:
        """Append new tokens to the cache, in place, and attend over it.

        Lengths and block table are read on the device, so a CUDA graph may be replayed with others; what lies in
        them is not checked there (``check_lengths`` does, and waits for the GPU). max_total sizes grids and
        workspace: give the largest total of the calls to come, or None for all that the cache holds.

        Args:
            query, key, value, past_lengths, new_lengths, block_table: as gsrq_export.cuda.check.CallTensors says.
            cache: updated.
        Returns:
            of query's type [B, T, heads, head_dim], zero in the padding.
        Raises:
            GsrqError: a tensor of the wrong type, shape, device or layout.
        """
        return torch.ops.gsrq.attention(  # type: ignore[no-any-return]
            query.contiguous(),
            key.contiguous(),
            value.contiguous(),
            past_lengths,
            new_lengths,
            cache.key_codes,
            cache.value_codes,
            cache.key_exact,
            cache.value_exact,
            block_table,
            self.handle,
            max_total,
        )

    def encode(self, vectors: torch.Tensor, side: str) -> torch.Tensor:
        """Codes of vectors of all KV heads.

        Args:
            vectors: float32, float16 or bfloat16 [..., KV heads * head_dim].
            side: "keys" or "values".
        Returns:
            int8 [..., code bytes].
        """
        return torch.ops.gsrq.encode(vectors.contiguous(), side, self.handle)  # type: ignore[no-any-return]

    def check_lengths(self, call: CallTensors, max_total: int | None = None) -> None:
        """Check a call's tensors and what lies in them; waits for the GPU.

        Raises:
            GsrqError: what is wrong.
        """
        check_lengths(self.shape, call, check_call(self.shape, call, max_total))


def layer_of(handle: int) -> CudaLayer:
    """The layer of a handle.

    Raises:
        GsrqError: it is gone.
    """
    layer = _LAYERS.get(handle)
    if layer is None:
        raise GsrqError(f"layer {handle} is gone", "keep the CudaLayer for as long as code that calls it")
    return layer
