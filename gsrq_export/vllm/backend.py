"""The attention backend: what vLLM's model runner asks of it, and a layer's attention over its pages.

Written against vllm/v1/attention/backend.py of vLLM 0.33.0.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import KVCacheLayout

from gsrq_export.cuda.layer import CudaLayer
from gsrq_export.cuda.rows import Rows, RowsCall
from gsrq_export.errors import GsrqError
from gsrq_export.hosting.layers import differences, torch_layer
from gsrq_export.hosting.rows import attend_rows
from gsrq_export.vllm.pages import LayerPages
from gsrq_export.vllm.served import Served, served_artifact
from gsrq_export.vllm.spec import GsrqSpec


@dataclass
class Batch:
    """Sequences of a step whose new tokens are at most ``rows.steps``.

    Attributes:
        exact_table: int32 [B, exact pages], their pages of the exact buffers.
        block_table: int32 [B, pages], those of codes.
        max_total: no sequence has more tokens after the step.
    """

    rows: Rows
    exact_table: torch.Tensor
    block_table: torch.Tensor
    max_total: int


@dataclass
class GsrqMetadata:
    """A step's sequences: those that decode one token, and the others by the length of what is new."""

    batches: list[Batch]


class GsrqBuilder(AttentionMetadataBuilder[GsrqMetadata]):  # type: ignore[misc]
    """Groups a step's sequences, and holds the served model to the artifact once, before the first."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.NEVER

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        served = served_artifact()
        _check_settings(served, vllm_config)
        context = vllm_config.compilation_config.static_forward_context
        for name in layer_names:
            context[name].impl.bind(name, served, kv_cache_spec, device)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> GsrqMetadata:
        """Group a step's sequences; only what vLLM has on the host is read there."""
        common = common_attn_metadata
        bounds = common.query_start_loc_cpu[: common.num_reqs + 1].tolist()
        new = [after - before for before, after in itertools.pairwise(bounds)]
        groups: dict[int, list[int]] = {}
        for row, count in enumerate(new):
            if count:  # within a group the padding is less than half
                groups.setdefault((count - 1).bit_length(), []).append(row)
        device, spec = common.seq_lens.device, self.kv_cache_spec
        width = spec.exact_pages + max(-(-spec.rule.coded(common.max_seq_len) // spec.block_size), 1)
        batches = []
        for rows in groups.values():
            counts = torch.tensor([new[row] for row in rows], device=device)
            starts = torch.tensor([bounds[row] for row in rows], device=device)
            index = torch.tensor(rows, device=device)
            past = common.seq_lens[index].long() - counts
            table = common.block_table_tensor[index, :width].int()
            exact, coded = (part.contiguous() for part in (table[:, : spec.exact_pages], table[:, spec.exact_pages :]))
            steps = max(new[row] for row in rows)
            batches.append(Batch(Rows(counts, past, starts, steps), exact, coded, common.max_seq_len))
        return GsrqMetadata(batches)


class GsrqImpl(AttentionImpl[GsrqMetadata]):  # type: ignore[misc]
    """One layer's attention. Which of the artifact's layers it is, `bind` is told before the first step."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        **others: Any,
    ) -> None:
        wrong = [name for name, value in others.items() if value is not None]
        wrong += ["alibi_slopes"] * (alibi_slopes is not None)
        wrong += [f"attention of type {attn_type}"] * (attn_type != "decoder")
        wrong += ["a cache shared between layers"] * (kv_sharing_target_layer_name is not None)
        if wrong:
            raise GsrqError(f"the served model's attention has {', '.join(wrong)}", "serve the artifact's own model")
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.sliding_window = sliding_window or 0
        self.logits_soft_cap = float(logits_soft_cap or 0.0)
        self.kv_cache_dtype = kv_cache_dtype
        self.layer: CudaLayer | None = None

    def bind(self, name: str, served: Served, spec: GsrqSpec, device: torch.device) -> None:
        """Find the layer's codebooks and hold its attention to what they were trained for.

        Raises:
            GsrqError: the attention differs.
        """
        index = served.index(name)
        wrong = differences(
            served.layers.layers[index],
            self.num_kv_heads,
            self.head_size,
            self.scale,
            self.logits_soft_cap,
            self.sliding_window,
        )
        if wrong:
            raise GsrqError(
                f"layer {name} of the served model has {'; '.join(wrong)} as the artifact has it",
                "serve the artifact's own model on one GPU (no tensor parallelism)",
            )
        self.layer = torch_layer(served.directory, index, self.num_heads, torch.device(device), spec.block_size)
        self.exact_dtype, self.exact_pages = served.exact_dtype, spec.exact_pages

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: GsrqMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Append the step's tokens to their sequences' pages and attend.

        Args:
            query: [tokens, heads, head_dim], rotated.
            key, value: [tokens, KV heads, head_dim], key rotated.
            kv_cache: the layer's pages, int8 [pages, 1, tokens a page, bytes].
            attn_metadata: None while vLLM measures its memory: nothing is done.
            output: of query's shape; zero where no sequence has a token.
        """
        if output_scale is not None or output_block_scale is not None:
            raise GsrqError("vLLM wants the attention's output quantized", "turn the fusion of attention off")
        output.zero_()
        if attn_metadata is None:
            return output
        if self.layer is None:
            raise GsrqError("a layer was run before its metadata was built", "use the version of docs/deploy-vllm.md")
        pages = LayerPages(kv_cache, self.layer.shape, self.exact_dtype, self.exact_pages)
        codes = pages.key_codes, pages.value_codes
        for batch in attn_metadata.batches:
            tokens, exact = (query, key, value), pages.exact(batch.exact_table)
            call = RowsCall(tokens, batch.rows, codes, batch.block_table, exact, output, batch.max_total)
            attend_rows(self.layer, call)
        return output


class GsrqBackend(AttentionBackend):  # type: ignore[misc]
    """The backend that `gsrq_export.vllm.register` gives vLLM by this class's path."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto"]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[GsrqImpl]:
        return GsrqImpl

    @staticmethod
    def get_builder_cls() -> type[GsrqBuilder]:
        return GsrqBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        """Whole blocks of the cache rule."""
        return [MultipleOf(served_artifact().block_multiple)]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return sorted({layer.shape.head_dim for layer in served_artifact().layers.layers})

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[Any, ...]:
        """A layer's pages lie together, see gsrq_export.vllm.pages."""
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        return False

    @classmethod
    def customize_spec(cls, spec: Any) -> GsrqSpec:
        """The cache that the artifact's layers have, for a layer of either of vLLM's kinds (full, sliding window)."""
        served = served_artifact()
        return GsrqSpec(
            block_size=spec.block_size,
            num_kv_heads=spec.num_kv_heads,
            head_size=spec.head_size,
            head_size_v=spec.head_size_v,
            dtype=torch.int8,
            num_head_slots=1,
            state_content_bytes=served.token_bytes,
            rule=served.rule,
            exact_pages=served.exact_pages(spec.block_size),
        )


def _check_settings(served: Served, vllm_config: Any) -> None:
    """Refuse what takes tokens back, shares pages between sequences, or is longer than the artifact."""
    scheduler, longest = vllm_config.scheduler_config, served.layers.metadata.max_length
    if vllm_config.cache_config.enable_prefix_caching:
        raise GsrqError(
            "vLLM's prefix caching is on: pages would be shared", "start it with --no-enable-prefix-caching"
        )
    if vllm_config.speculative_config is not None:
        raise GsrqError("vLLM speculates: tokens are coded for good", "start it without speculative decoding")
    if vllm_config.model_config.max_model_len > longest:
        raise GsrqError(
            f"max_model_len is {vllm_config.model_config.max_model_len}, the artifact's longest text {longest}",
            f"start vLLM with --max-model-len {longest}",
        )
    if served.layers.metadata.exact_prefill and scheduler.enable_chunked_prefill:
        raise GsrqError(
            "chunked prefill is on, and the artifact's prompts are exact to themselves (prefill: exact)",
            "start vLLM with --no-enable-chunked-prefill and --max-num-batched-tokens of the longest prompt",
        )
