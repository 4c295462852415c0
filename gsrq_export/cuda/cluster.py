"""Clustering's two steps for many groups at once: rows to codewords, and codewords from their rows.

On a GPU the kernels of plugins/src/cuda/cluster*.cu, which write no matrix of rows by codewords; on the CPU the plain
reference that they are held to. Launches go to the current stream and do not wait.
"""

from __future__ import annotations

import ctypes
from typing import Literal, NamedTuple

import torch

from gsrq_export.cache.rule import CODEBOOK_SIZE
from gsrq_export.cuda.library import ClusteringStruct, load
from gsrq_export.errors import GsrqError

Form = Literal["sums", "means", "gain-shape"]
FORMS: dict[Form, int] = {"sums": 0, "means": 1, "gain-shape": 2}
MOST_WIDTH = 512
ALIGNMENT = 16  # bytes
TINY = 1e-12


class Assigned(NamedTuple):
    """codes: uint8 [G, N]; gains: float32 [G, N], each row's best score; inertia: float64 [G], sum of weight * gain."""

    codes: torch.Tensor
    gains: torch.Tensor
    inertia: torch.Tensor


class Updated(NamedTuple):
    """words: float32 [G, 256, D], zeros for a codeword without weight; totals: float32 [G, 256], sums of weights."""

    words: torch.Tensor
    totals: torch.Tensor


def assign(
    vectors: torch.Tensor, words: torch.Tensor, weights: torch.Tensor | None = None, inner: bool = False
) -> Assigned:
    """The codeword of each row with the most 2 <x, c> - ||c||^2; of equals the lowest.

    Args:
        vectors: float32 [G, N, D], finite.
        words: float32 [G, 256, D].
        weights: float32 [G, N], for the inertia; None: ones.
        inner: by <x, c> instead.
    Raises:
        GsrqError: a tensor is not what it must be, or the kernels do not support it.
    """
    groups, rows, width = _check(vectors, weights=weights)
    _check_tensor("words", words, (groups, CODEBOOK_SIZE, width), vectors.device)
    if not vectors.is_cuda:
        return _assign_reference(vectors, words, weights, inner)
    codes = torch.empty(groups, rows, dtype=torch.uint8, device=vectors.device)
    gains = torch.empty(groups, rows, device=vectors.device)
    inertia = torch.empty(groups, dtype=torch.float64, device=vectors.device)
    words = words.contiguous()  # kept: its memory must not become the workspace
    outputs = (t.data_ptr() for t in (codes, gains, inertia))
    _launch("assign", (vectors, weights, None), words.data_ptr(), int(inner), *outputs)
    return Assigned(codes, gains, inertia)


def update(
    vectors: torch.Tensor,
    codes: torch.Tensor,
    form: Form,
    weights: torch.Tensor | None = None,
    norms: torch.Tensor | None = None,
    words: torch.Tensor | None = None,
) -> Updated:
    """New codewords from the rows of each code: weighted sums, weighted means, or those of gain-shape k-means.

    Args:
        vectors: float32 [G, N, D], finite.
        codes: uint8 [G, N].
        weights: float32 [G, N]; None: ones.
        norms: float32 [G, N], lengths of the vectors, for gain-shape.
        words: float32 [G, 256, D] before, for gain-shape: where the mean direction vanishes the old one stays.
    Raises:
        GsrqError: a tensor is not what it must be, or the kernels do not support it.
    """
    groups, rows, width = _check(vectors, weights=weights, norms=norms)
    _check_tensor("codes", codes, (groups, rows), vectors.device, torch.uint8)
    if form == "gain-shape" and (words is None or norms is None):
        raise GsrqError("form gain-shape: words or norms is None", "give the codewords before and the rows' lengths")
    if words is not None:
        _check_tensor("words", words, (groups, CODEBOOK_SIZE, width), vectors.device)
    if not vectors.is_cuda:
        return _update_reference(vectors, codes, form, weights, norms, words)
    fresh = torch.empty(groups, CODEBOOK_SIZE, width, device=vectors.device)
    totals = torch.empty(groups, CODEBOOK_SIZE, device=vectors.device)
    codes = codes.contiguous()
    before = None if words is None else words.contiguous()
    memory = (codes.data_ptr(), None if before is None else before.data_ptr(), fresh.data_ptr(), totals.data_ptr())
    _launch("update", (vectors, weights, norms), FORMS[form], *memory)
    return Updated(fresh, totals)


def _launch(
    name: str, given: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None], *arguments: object
) -> None:
    groups, rows, width = given[0].shape
    device = given[0].device
    kept = [None if t is None else _aligned(t) for t in given]
    struct = ClusteringStruct(groups, width, rows, *(None if t is None else t.data_ptr() for t in kept))
    library, pointer = load(), ctypes.byref(struct)
    with torch.cuda.device(device):
        size = library.bytes("clustering_workspace", pointer)
        workspace = torch.empty(size, dtype=torch.uint8, device=device)
        stream = torch.cuda.current_stream(device).cuda_stream
        library.run(f"clustering_{name}", pointer, *arguments, workspace.data_ptr(), size, stream)


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


def _check(vectors: torch.Tensor, **of_rows: torch.Tensor | None) -> tuple[int, int, int]:
    if vectors.ndim != 3 or vectors.dtype != torch.float32 or 0 in vectors.shape:
        raise GsrqError(f"vectors are {vectors.dtype} {list(vectors.shape)}", "give float32 [groups, rows, width]")
    groups, rows, width = vectors.shape
    if width > MOST_WIDTH:
        raise GsrqError(f"vectors have width {width}", f"the kernels take {MOST_WIDTH} or less")
    for name, tensor in of_rows.items():
        if tensor is not None:
            _check_tensor(name, tensor, (groups, rows), vectors.device)
    return groups, rows, width


def _check_tensor(
    name: str,
    tensor: torch.Tensor,
    shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> None:
    if tensor.shape != shape or tensor.dtype != dtype or tensor.device != device:
        raise GsrqError(
            f"{name}: {tensor.dtype} {list(tensor.shape)} on {tensor.device}", f"give {dtype} {list(shape)} on {device}"
        )


def _assign_reference(
    vectors: torch.Tensor, words: torch.Tensor, weights: torch.Tensor | None, inner: bool
) -> Assigned:
    products = vectors @ words.transpose(1, 2)
    scores = products if inner else 2 * products - (words**2).sum(2)[:, None]
    gains, codes = scores.max(2)
    weighted = gains if weights is None else weights * gains
    return Assigned(codes.to(torch.uint8), gains, weighted.sum(1, dtype=torch.float64))


def _update_reference(
    vectors: torch.Tensor,
    codes: torch.Tensor,
    form: Form,
    weights: torch.Tensor | None,
    norms: torch.Tensor | None,
    words: torch.Tensor | None,
) -> Updated:
    weights = torch.ones_like(vectors[..., 0]) if weights is None else weights
    index = codes.long()

    def sums(values: torch.Tensor) -> torch.Tensor:
        out = values.new_zeros(len(values), CODEBOOK_SIZE, values.shape[2])
        return out.scatter_add_(1, index[..., None].expand_as(values), values)

    totals = sums(weights[..., None])[..., 0]
    plain = sums(weights[..., None] * vectors)
    if form == "sums":
        return Updated(plain, totals)
    share = totals.clamp(min=TINY)[..., None]
    means = plain / share
    if form == "means":
        return Updated(means, totals)
    assert norms is not None
    assert words is not None
    direction = sums((weights / norms.clamp(min=TINY))[..., None] * vectors) / share
    length = direction.norm(dim=2, keepdim=True)
    old = words / words.norm(dim=2, keepdim=True).clamp(min=TINY)
    shapes = torch.where(length > 1e-6, direction / length.clamp(min=TINY), old)
    return Updated((means * shapes).sum(2, keepdim=True).clamp(min=0) * shapes, totals)
