"""The operator ai.gsrq::GsrqAttention as an ONNX function of standard operators.

Stock ONNX Runtime runs it without any library; where a library with the operator is registered, that is
used instead. docs/operator.md states the semantics, cache/reference.py is the oracle: the codes are equal
to its codes. Shapes come from the inputs, so one function serves all layers.

Impossible lengths (docs/operator.md, errors) make the look-up of the rotary tables fail on purpose; the
message is then ONNX Runtime's "indices element out of data bounds". A capacity that no tiles fill, where codes are
ordered by head, fails in a Reshape.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper

from gsrq_export.cache.rule import CODE_TILE
from gsrq_export.export.coding import decode, encode
from gsrq_export.export.graph import Graph, Value

DOMAIN = "ai.gsrq"
OPERATOR = "GsrqAttention"
OPERATOR_VERSION = 1
OPSET = 21

INPUTS = (
    *("query", "key", "value", "cos", "sin", "past_lengths", "new_lengths"),
    *("key_codes", "value_codes", "key_exact", "value_exact"),
    *("key_codebooks", "value_codebooks", "key_transform", "value_transform"),
)
KEY_CENTER = "key_center"  # input 15, only of keys that are coded in the rotated frame
OUTPUTS = ("output", "present_key_codes", "present_value_codes", "present_key_exact", "present_value_exact")
REQUIRED = ("scale", "sinks", "window", "block")
OPTIONAL: dict[str, int | float] = {
    "beam": 1,
    "rope_interleaved": 0,
    "exact_prefill": 0,
    "softcap": 0.0,
    "sliding_window": 0,
}
NEVER = 2**62  # an age no token reaches


def build_function(rotated_keys: bool = False, codes_by_head: bool = False) -> onnx.FunctionProto:
    """The operator's body; two calls give the same bytes.

    Args:
        rotated_keys: of nodes whose keys are coded in the rotated frame. A body cannot ask whether an optional input is
            there, so each frame has its own; a model holds one.
        codes_by_head: of nodes whose stored codes are ordered by head: turned to token order where they enter, and back
            where they leave. The body of token order has none of that, and stays that of the first artifacts.
    """
    g = Graph()
    inputs = (*INPUTS, KEY_CENTER) if rotated_keys else INPUTS
    x = {name: g.value(name) for name in inputs}
    if codes_by_head:
        for side in ("key", "value"):
            x[f"{side}_codes"] = _to_token_order(g, x, side)
    rule = _Rule.write(g)
    past, new = x["past_lengths"].unsqueeze(1), x["new_lengths"].unsqueeze(1)  # [B, 1]
    total = past + new
    after = rule.coded(total)
    offset = g.arange(x["query"].dim(2))
    position = past + offset  # [B, T]
    real = offset < new

    impossible = (past < 0) | (new < 0) | (new > x["query"].dim(2)) | (total > x["cos"].dim(0))
    impossible = impossible | (after > x["key_codes"].dim(1))
    # Padding may lie past the table; a row that is impossible is sent there so that the look-up fails.
    turned = g.where(impossible, x["cos"].dim(0), g.op("Max", g.op("Min", position, total - 1), 0))

    # The exact buffer and after it the new tokens, which are rounded to its type: [B, E + T, N * d].
    exact = {}
    for side in ("key", "value"):
        buffer = x[f"{side}_exact"]
        joined = g.op("Concat", buffer, g.op("CastLike", x[side], buffer), axis=2)
        exact[side] = joined.transpose(0, 2, 1, 3).reshape(0, 0, -1)

    codes = _code_blocks(g, x, rule, exact, past, total, codes_by_head)
    _write_ring(g, x, rule, exact, past, total)

    # All that a query may see: the coded tokens, then the exact rows; -1 where there is none.
    most = g.op("ReduceMax", after, keepdims=0)
    coded_token = g.op("Expand", rule.sinks + g.arange(most), g.op("Concat", past.dim(0), most.unsqueeze(0), axis=0))
    token = g.op("Concat", coded_token, rule.slot_tokens(past), g.where(real, position, -1), axis=1)  # [B, L]
    seen_at = position - offset * g.attribute("exact_prefill", int) + 1
    first_exact = rule.sinks + g.op("Min", rule.coded(seen_at), after)
    visible = _visible(g, token.unsqueeze(1), position.unsqueeze(2), rule.sinks, first_exact.unsqueeze(2), most)

    decoded, plain = {}, {}
    for side in ("key", "value"):
        coded = decode(g, codes[side].slice(1, 0, most.unsqueeze(0)), x[f"{side}_codebooks"])
        decoded[side], plain[side] = coded, exact[side].cast(TensorProto.FLOAT)
    table = g.op("Max", token, 0)
    query = _rotate(g, x["query"], x, turned)
    if rotated_keys:
        coded_heads = _heads(g, decoded["key"], x)
        center = g.op("Expand", _center(x), g.op("Shape", coded_heads))
        place = table.slice(1, 0, most.unsqueeze(0))
        old = coded_heads + _natural(g, _rotate(g, center, x, place), x)
        late = table.slice(1, most.unsqueeze(0), NEVER)
        new = _natural(g, _rotate(g, _heads(g, plain["key"], x), x, late), x)
        keys, query = g.op("Concat", old, new, axis=2), _natural(g, query, x)
    else:
        keys = _rotate(g, _heads(g, g.op("Concat", decoded["key"], plain["key"], axis=1), x), x, table)
    values = _heads(g, g.op("Concat", decoded["value"], plain["value"], axis=1), x)
    output = _attend(g, query, keys, values, visible)
    # The padding saw nothing: its softmax is not a number, its output is zero.
    g.op("Where", real.unsqueeze(2, 3), output, 0.0, name="output")

    optional = OPTIONAL | ({"key_frame": 1} if rotated_keys else {}) | ({"code_order": 1} if codes_by_head else {})
    return helper.make_function(
        DOMAIN,
        OPERATOR,
        inputs,
        OUTPUTS,
        g.nodes,
        [helper.make_opsetid("", OPSET)],
        attributes=REQUIRED,
        attribute_protos=[helper.make_attribute(name, value) for name, value in optional.items()],
    )


@dataclass(frozen=True)
class _Rule:
    """cache/rule.py as nodes; its docstrings apply."""

    graph: Graph
    sinks: Value
    window: Value
    block: Value
    beam: Value
    ring: Value
    slots: Value

    @classmethod
    def write(cls, g: Graph) -> _Rule:
        sinks, window, block, beam = (g.attribute(name, int) for name in ("sinks", "window", "block", "beam"))
        return cls(g, sinks, window, block, beam, window + block, sinks + (window + block))

    def coded(self, n: Value) -> Value:
        return self.graph.op("Max", n - self.sinks - self.window, 0) // self.block * self.block

    def slot(self, token: Value) -> Value:
        return self.graph.where(token < self.sinks, token, (token - self.sinks) % self.ring + self.sinks)

    def slot_tokens(self, length: Value) -> Value:
        """length: [B, 1]; returns [B, E]."""
        slot = self.graph.arange(self.slots)
        last = length - 1
        sink = slot < self.sinks
        token = self.graph.where(sink, slot, last - (last - slot) % self.ring)
        valid = (token <= last) & (sink | (token >= self.sinks))
        return self.graph.where(valid, token, -1)


def _code_blocks(
    g: Graph,
    x: dict[str, Value],
    rule: _Rule,
    exact: dict[str, Value],
    past: Value,
    total: Value,
    codes_by_head: bool,
) -> dict[str, Value]:
    """The codes after the call, in token order; the blocks that leave the window are encoded, padded to the row that
    has most."""
    before, after = rule.coded(past), rule.coded(total)
    longest = g.op("ReduceMax", after - before, keepdims=0)
    token = rule.sinks + before + g.arange(longest)
    token = g.op("Min", token, g.op("Max", total - 1, 0))  # the padding codes some token that exists
    source = g.where(token < past, rule.slot(token), token - past + rule.slots)
    present = {}
    for side in ("key", "value"):
        codes = x[f"{side}_codes"]
        row = g.arange(codes.dim(1))
        pick = g.where((row >= before) & (row < after), row - before + codes.dim(1), row)

        def encoded(side: str = side, codes: Value = codes, pick: Value = pick) -> Value:
            vectors = exact[side].rows(source)
            if side == "key" and KEY_CENTER in x:
                vectors = _framed(g, vectors, x, token)
            made = encode(g, vectors, x[f"{side}_codebooks"], x[f"{side}_transform"], rule.beam)
            return g.op("Concat", codes, made, axis=1).rows(pick)

        def unchanged(codes: Value = codes) -> Value:
            return codes

        name = f"present_{side}_codes"
        present[side] = g.choose(longest > 0, encoded, unchanged, name="" if codes_by_head else name)
        if codes_by_head:
            _from_token_order(g, x, side, present[side], name)
    return present


def _code_run(g: Graph, x: dict[str, Value], side: str) -> Value:
    """cache/rule.py's code_run by head, int64 [1]."""
    words = x[f"{side}_codebooks"]
    return g.op("Max", x["key"].dim(3) // words.dim(3), 1) * words.dim(1)


def _to_token_order(g: Graph, x: dict[str, Value], side: str) -> Value:
    """The codes as they are stored, row by row; cache/rule.py states the order."""
    codes, run = x[f"{side}_codes"], _code_run(g, x, side)
    rows, row_bytes = codes.dim(1), codes.dim(2)
    tiles = codes.reshape(codes.dim(0), rows // CODE_TILE, row_bytes // run, CODE_TILE, run)
    return tiles.transpose(0, 1, 3, 2, 4).reshape(codes.dim(0), rows, row_bytes)


def _from_token_order(g: Graph, x: dict[str, Value], side: str, codes: Value, name: str) -> None:
    """The reverse of _to_token_order, as the output ``name``."""
    run = _code_run(g, x, side)
    rows, row_bytes = codes.dim(1), codes.dim(2)
    tiles = codes.reshape(codes.dim(0), rows // CODE_TILE, CODE_TILE, row_bytes // run, run)
    shape = g.op("Shape", codes)
    g.op("Reshape", tiles.transpose(0, 1, 3, 2, 4), shape, allowzero=1, name=name)


def _write_ring(g: Graph, x: dict[str, Value], rule: _Rule, exact: dict[str, Value], past: Value, total: Value) -> None:
    """The exact buffers after the call; slots that get no new token keep their content."""
    token = rule.slot_tokens(total)
    source = g.where(token >= past, token - past + rule.slots, g.arange(rule.slots))
    for side in ("key", "value"):
        rows = exact[side].rows(source).reshape(0, 0, x["key"].dim(1), x["key"].dim(3))
        g.op("Transpose", rows, perm=[0, 2, 1, 3], name=f"present_{side}_exact")


def _visible(g: Graph, token: Value, position: Value, sinks: Value, first_exact: Value, most: Value) -> Value:
    """bool [B, T, L]: what each query sees. token: [B, 1, L]; position, first_exact: [B, T, 1]."""
    coded = g.arange(token.dim(2)) < most
    # Coded tokens before first_exact, exact ones from there on; the sinks are never coded.
    visible = g.op("Equal", coded, token < first_exact) | (token < sinks)
    window = g.attribute("sliding_window", int)
    age = position - token
    return visible & (token >= 0) & (age >= 0) & (age < g.where(window > 0, window, NEVER))


def _heads(g: Graph, rows: Value, x: dict[str, Value]) -> Value:
    """[B, L, N * d] -> [B, N, L, d]."""
    return rows.reshape(0, 0, x["key"].dim(1), x["key"].dim(3)).transpose(0, 2, 1, 3)


def _center(x: dict[str, Value]) -> Value:
    """The rotated frame's center, [1, N, 1, d]."""
    return x[KEY_CENTER].reshape(1, x["key"].dim(1), 1, x["key"].dim(3))


def _framed(g: Graph, rows: Value, x: dict[str, Value], position: Value) -> Value:
    """Keys [B, L, N * d] at positions [B, L] in the rotated frame: in float64, rounded once (cache/frame.py)."""
    centred = _heads(g, rows, x).cast(TensorProto.DOUBLE) - _center(x).cast(TensorProto.DOUBLE)
    turned = _natural(g, _rotate(g, centred, x, position, TensorProto.DOUBLE), x)
    return turned.cast(TensorProto.FLOAT).transpose(0, 2, 1, 3).reshape(0, 0, x["key"].dim(1) * x["key"].dim(3))


def _natural(g: Graph, rotated: Value, x: dict[str, Value]) -> Value:
    """What ``_rotate`` gives in the order in which heads are stored."""
    half, element = x["cos"].dim(1), g.arange(x["key"].dim(3))
    paired = (g.attribute("rope_interleaved", int) > 0) & (element < half * 2)
    return g.op("Gather", rotated, g.where(paired, element // 2 + element % 2 * half, element), axis=3)


def _rotate(g: Graph, heads: Value, x: dict[str, Value], position: Value, dtype: int = TensorProto.FLOAT) -> Value:
    """Rotary embedding. heads: [B, heads, L, d] of ``dtype``; position: [B, L].

    The rotated elements come out as all first ones of the pairs, then all second ones, in either pairing:
    queries and keys are ordered alike, and their product does not depend on the order.
    """
    cos, sin = (g.take(x[name], position).unsqueeze(1) for name in ("cos", "sin"))
    if dtype != TensorProto.FLOAT:
        cos, sin = cos.cast(dtype), sin.cast(dtype)
    half = x["cos"].dim(1)
    interleaved = g.attribute("rope_interleaved", int)
    step = interleaved + g.ints(1)
    second = g.where(interleaved > 0, 1, half)
    a, b = heads.slice(3, 0, half * step, step), heads.slice(3, second, half * 2, step)
    rest = heads.slice(3, half * 2, heads.dim(3))
    return g.op("Concat", a * cos - b * sin, b * cos + a * sin, rest, axis=3)


def _attend(g: Graph, query: Value, keys: Value, values: Value, visible: Value) -> Value:
    """query: [B, H, T, d]; keys, values: [B, N, L, d]; visible: [B, T, L]; returns [B, T, H, d]."""
    kv_heads, steps, head_dim = keys.dim(1), query.dim(2), query.dim(3)
    grouped = (query * g.attribute("scale", float)).reshape(0, kv_heads, -1, head_dim)  # [B, N, g * T, d]
    score = g.op("MatMul", grouped, keys.transpose(0, 1, 3, 2))
    cap = g.attribute("softcap", float)
    score = g.choose(cap > 0.0, lambda: g.op("Tanh", g.op("Div", score, cap)) * cap, lambda: score)
    score = score.reshape(0, 0, -1, steps, keys.dim(2))
    score = g.where(visible.unsqueeze(1, 2), score, -np.inf)
    weight = g.op("Softmax", score, axis=-1).reshape(0, 0, -1, keys.dim(2))
    output = g.op("MatMul", weight, values)  # [B, N, g * T, d]
    return output.reshape(0, query.dim(1), steps, head_dim).transpose(0, 2, 1, 3)
