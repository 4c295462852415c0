"""What a recipe says of its model's architecture: enough to size a cache and to draw a tiny model of the same kind.

A recipe that states it can be sized without the model, and refuses a model that is another one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from gsrq_export.errors import GsrqError

Positive = Annotated[int, Field(ge=1)]
Factor = Annotated[float, Field(gt=0, allow_inf_nan=False)]
RopeType = Literal["linear", "dynamic", "yarn", "llama3", "longrope"]
ROPE_FIELDS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
CACHE_FIELDS = (  # what a model must have in common with the architecture that its recipe states
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rope_theta",
    "partial_rotary_factor",
    "sliding_window",
    "attn_logit_softcapping",
)


class RopeScaling(BaseModel):
    """How rotary frequencies are scaled; the fields are those of transformers' configurations.

    longrope's two lists of factors are not here: they come with the model.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    rope_type: RopeType
    factor: Factor | None = None
    low_freq_factor: Factor | None = None
    high_freq_factor: Factor | None = None
    original_max_position_embeddings: Positive | None = None


class Architecture(BaseModel):
    """A decoder as its published configuration describes it; the fields are those of transformers' configurations."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    model_type: Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]
    num_hidden_layers: Positive
    hidden_size: Positive
    intermediate_size: Positive
    num_attention_heads: Positive
    num_key_value_heads: Positive
    head_dim: Annotated[int, Field(ge=2)]
    vocab_size: Positive
    max_position_embeddings: Positive
    rope_theta: Factor = 10000.0
    rope_scaling: RopeScaling | None = None
    partial_rotary_factor: Annotated[float, Field(gt=0, le=1)] = 1.0
    sliding_window: Positive | None = None  # which layers have it is the model type's matter
    attn_logit_softcapping: Factor | None = None
    final_logit_softcapping: Factor | None = None
    query_pre_attn_scalar: Positive | None = None
    tie_word_embeddings: bool = False

    @model_validator(mode="after")
    def _agree(self) -> Architecture:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"{self.num_attention_heads} heads are not a multiple of {self.num_key_value_heads} KV heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd and cannot be rotated in pairs")
        return self

    @property
    def kv_shape(self) -> tuple[int, int]:
        """(num_kv_heads, head_dim) of each layer."""
        return self.num_key_value_heads, self.head_dim

    def check_model(self, config: Any, name: str) -> None:
        """Refuse a model whose cache is not what the recipe states.

        Args:
            config: the model's transformers configuration.
            name: the recipe's, for the message.
        Raises:
            GsrqError: every field that differs, with both values.
        """
        found = architecture_of(config)
        wrong = [
            f"{field} is {getattr(found, field)!r} in the model and {getattr(self, field)!r} in the recipe"
            for field in (*CACHE_FIELDS, "rope_scaling")
            if getattr(found, field) != getattr(self, field)
        ]
        if wrong:
            raise GsrqError(
                f"recipe {name}: model.architecture is not that of the model: " + "; ".join(wrong),
                "point model.path at the model the recipe is for, or correct or drop model.architecture",
            )


def architecture_of(config: Any) -> Architecture:
    """What a transformers configuration says, in the same words."""
    config = config.get_text_config()
    heads = int(config.num_attention_heads)
    rope: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    if "rope_theta" not in rope:  # a table a kind of layer; the full layers' one stands for them
        rope = next((v for k, v in rope.items() if isinstance(v, dict) and k == "full_attention"), rope)
    kind = rope.get("rope_type", "default")
    partial = rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None))

    def optional(field: str, cast: type) -> Any:
        value = getattr(config, field, None)
        return None if value is None else cast(value)

    return Architecture(
        model_type=str(config.model_type),
        num_hidden_layers=int(config.num_hidden_layers),
        hidden_size=int(config.hidden_size),
        intermediate_size=int(config.intermediate_size),
        num_attention_heads=heads,
        num_key_value_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        vocab_size=int(config.vocab_size),
        max_position_embeddings=int(config.max_position_embeddings),
        rope_theta=float(rope.get("rope_theta", 10000.0)),
        rope_scaling=None if kind == "default" else _scaling(kind, rope),
        partial_rotary_factor=float(1.0 if partial is None else partial),
        sliding_window=optional("sliding_window", int),
        attn_logit_softcapping=optional("attn_logit_softcapping", float),
        final_logit_softcapping=optional("final_logit_softcapping", float),
        query_pre_attn_scalar=optional("query_pre_attn_scalar", int),
        tie_word_embeddings=bool(config.tie_word_embeddings),
    )


def _scaling(kind: str, rope: Mapping[str, Any]) -> RopeScaling:
    fields = {name: rope[name] for name in ROPE_FIELDS if rope.get(name) is not None}
    factors = {name: float(value) for name, value in fields.items() if name != "original_max_position_embeddings"}
    whole = {name: int(value) for name, value in fields.items() if name == "original_max_position_embeddings"}
    try:
        return RopeScaling(rope_type=kind, **factors, **whole)  # type: ignore[arg-type]
    except ValueError:
        raise GsrqError(f"rope_type {kind!r} is not known here", "see docs/models.md") from None
