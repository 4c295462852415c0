"""Encoding and decoding with a residual codebook, written as ONNX nodes; the stages are walked by Scan.

codec/codebook.py is the reference. Encoding is in float64 like there, and TopK, like the reference, gives
equal candidates in the order of their index, so the codes are the same.
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from gsrq_export.cache.rule import CODEBOOK_SIZE
from gsrq_export.export.graph import Graph, Value


def decode(g: Graph, codes: Value, codewords: Value) -> Value:
    """Sum of codewords. codes: int8 [B, L, G*R]; codewords: [G, R, 256, D]; returns float [B, L, G*D].

    Never more than one stage of codewords is spread out: the sum grows in place of a [L, R, D] tensor.
    """
    groups, stages, width = codewords.dim(0), codewords.dim(1), codewords.dim(3)
    index = codes.cast(TensorProto.INT64) % CODEBOOK_SIZE  # int8 holds the byte's bit pattern
    index = index.reshape(codes.dim(0), codes.dim(1), groups, stages)
    first = g.arange(groups) * CODEBOOK_SIZE  # row of a group's codeword 0

    def add(total: Value, stage: Value, code: Value) -> tuple[list[Value], list[Value]]:
        chosen = g.take(stage.reshape(-1, width), code + first)  # [B, L, G, D]
        return [total + chosen.cast(TensorProto.FLOAT)], []

    shape = g.op("Concat", codes.dim(0), codes.dim(1), groups, width, axis=0)
    total = g.scan(add, [g.op("ConstantOfShape", shape)], [(codewords, 1), (index, 3)])[0]
    return total.reshape(codes.dim(0), codes.dim(1), groups * width)


def encode(g: Graph, vectors: Value, codewords: Value, transform: Value, beam: Value) -> Value:
    """Codes by beam search. vectors: [B, L, G*D] with B * L >= 1; beam: int64 scalar; returns int8 [B, L, G*R]."""
    groups, stages, width = codewords.dim(0), codewords.dim(1), codewords.dim(3)
    metric = transform.cast(TensorProto.DOUBLE).transpose(0, 2, 1)
    target = vectors.reshape(-1, groups, width).cast(TensorProto.DOUBLE).transpose(1, 0, 2)
    target = g.op("MatMul", target, metric)  # [G, M, D], M = B * L
    kept = beam.unsqueeze(0)
    group = g.arange(groups).unsqueeze(1, 2)  # [G, 1, 1]
    # Row of path 0 among all groups' and vectors' paths.
    path = g.arange(groups * target.dim(1)).reshape(groups, -1, 1) * beam
    one = g.ints(1)
    twice = g.constant(np.array(2, dtype=np.float64))

    def stage(residual: Value, error: Value, words: Value) -> tuple[list[Value], list[Value]]:
        """residual: [G, M * beam, D]; error: [G, M, beam]; words: [G, 256, D]."""
        words = g.op("MatMul", words.cast(TensorProto.DOUBLE), metric)
        norm = g.op("ReduceSum", words * words, g.ints(2), keepdims=0).unsqueeze(1)
        gain = g.op("MatMul", residual, words.transpose(0, 2, 1)) * twice - norm
        candidates = error.unsqueeze(3) - gain.reshape(groups, -1, kept, CODEBOOK_SIZE)
        candidates = candidates.reshape(groups, -1, kept * CODEBOOK_SIZE)
        error, order = g.multi("TopK", 2, candidates, kept, axis=2, largest=0, sorted=1)
        parent, code = order // CODEBOOK_SIZE, order % CODEBOOK_SIZE
        chosen = g.take(words.reshape(-1, width), code + group * CODEBOOK_SIZE)  # [G, M, beam, D]
        residual = g.take(residual.reshape(-1, width), parent + path) - chosen
        return [residual.reshape(groups, -1, width), error], [parent, code]

    # All of the beam's paths exist from the start; those but the first cannot win until they are replaced.
    paths = g.op("Expand", target.unsqueeze(2), g.op("Concat", one, one, kept, one, axis=0)).reshape(groups, -1, width)
    start = g.where(g.arange(beam) < 1, 0.0, np.inf).cast(TensorProto.DOUBLE)
    start = g.op("Expand", start, g.op("Concat", groups, target.dim(1), kept, axis=0))
    _, _, parents, codes = g.scan(stage, [paths, start], [(codewords, 1)], outputs=2)  # [R, G, M, beam]

    def back(at: Value, parent: Value, code: Value) -> tuple[list[Value], list[Value]]:
        return [g.op("GatherElements", parent, at, axis=2)], [g.op("GatherElements", code, at, axis=2)]

    best = path * 0  # the first path at the end wins: [G, M, 1]
    _, code = g.scan(back, [best], [(parents, 0), (codes, 0)], outputs=1, reverse=True)  # [R, G, M, 1]
    code = g.where(code > 127, code - CODEBOOK_SIZE, code).cast(TensorProto.INT8)
    return code.transpose(2, 1, 0, 3).reshape(vectors.dim(0), -1, groups * stages)
