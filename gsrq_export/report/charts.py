"""The charts of a build's report, each with its title and what a reader must know of it; none without data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from gsrq_export.evaluate.suite import Evaluation
from gsrq_export.report.schema import BuildMetrics, CacheSize, Kind, LayerProfile, RatePoint
from gsrq_export.report.svg import Axis, Curve, Series, bars, heatmap, number, plot

KINDS: tuple[Kind, ...] = ("key", "value")
BIT_TICKS = [(2.0**k, f"{2.0**k:g}") for k in range(-4, 6)]
LEAST_INCREASE, LEAST_KL, LEAST_ERROR = 0.1, 1e-5, 1e-6  # percent, nats, share: where logarithmic axes end

Measured = tuple[RatePoint, float, tuple[float, float] | None]  # a row, its loss, the interval


@dataclass(frozen=True)
class Figure:
    title: str
    note: str
    chart: Markup


def tokens(count: int) -> str:
    return f"{count // 1024}k" if count >= 1024 and count % 1024 == 0 else str(count)


def size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.3g} {unit}" if count < 1000 else f"{count:.0f} {unit}"


def serving_of(point: str) -> tuple[int, int]:
    """Tokens and sequences of "8192x64"; "8192" is one sequence."""
    count, _, sequences = point.partition("x")
    return int(count), int(sequences or 1)


def serving(point: str) -> str:
    """To read: "8k", or "64 × 8k"."""
    count, sequences = serving_of(point)
    return tokens(count) if sequences == 1 else f"{sequences} \N{MULTIPLICATION SIGN} {tokens(count)}"


def shared_point(rates: Sequence[RatePoint]) -> str | None:
    """Where all rows have effective bits, the point with the most tokens; None where there is no such point."""
    points = set.intersection(*(set(r.effective_bits) for r in rates)) if rates else set()
    return max(points, key=lambda point: (math.prod(serving_of(point)), point), default=None)


def rate_figures(rates: Sequence[RatePoint], exact: Evaluation | None = None) -> list[Figure]:
    """Loss by metric against bits: ours a line, the others points with their names, the exact cache dashed.

    Args:
        exact: of the exact cache on the same cases.
    """
    if not rates:
        return []
    figures, at = [], shared_point(rates)
    for text in _names(rates, lambda r: r.perplexity_ratio):
        found = [
            (r, max(LEAST_INCREASE, 100 * (r.perplexity_ratio[text] - 1)), None)
            for r in rates
            if text in r.perplexity_ratio
        ]
        axis = Axis("perplexity increase, %", log=True)
        note = f"Increase over the exact cache; lower is better{_ends_at(found, LEAST_INCREASE, ' %')}."
        chart = _rate_plot(f"Perplexity, {text}", axis, found, at)
        figures.append(Figure(f"Perplexity ({text}) against bits", note, chart))
    recall = exact["recall"] if exact else None
    known = {row["tokens"]: row["rate"] for row in recall["lengths"]} if recall else {}
    for length in sorted({row.tokens for r in rates for row in r.recall}):
        of_length = [(r, row.rate, (row.low, row.high)) for r in rates for row in r.recall if row.tokens == length]
        title = f"Recall at {tokens(length)} tokens"
        chart = _rate_plot(title, Axis("recall", high=1.0), of_length, at, known.get(length))
        figures.append(Figure(f"{title} against bits", "Higher is better; whiskers are 95 % intervals.", chart))
    if diverged := [(r, max(LEAST_KL, r.kl), None) for r in rates if r.kl is not None]:
        note = f"Of the next token from the exact cache's; lower is better{_ends_at(diverged, LEAST_KL, ' nats')}."
        chart = _rate_plot("KL", Axis("KL, nats a token", log=True), diverged, at)
        figures.append(Figure("KL divergence against bits", note, chart))
    part: Mapping[str, Any] = exact or {}
    scores = {f"{entry['task']}@{entry['tokens']}": entry["score"] for entry in part.get("tasks") or ()}
    for task in _names(rates, lambda r: r.tasks or {}):
        scored = [(r, r.tasks[task], None) for r in rates if r.tasks and task in r.tasks]
        chart = _rate_plot(f"Task {task}", Axis("score", high=1.0), scored, at, scores.get(task))
        figures.append(Figure(f"Task {task} against bits", "Mean score; higher is better.", chart))
    return figures


def _ends_at(found: Sequence[Measured], least: float, unit: str) -> str:
    """Says so where a loss is too small for its logarithmic axis."""
    if all(value > least for _, value, _ in found):
        return ""
    return f"; less than {number(least)}{unit} is drawn at {number(least)}{unit}"


def _names(rates: Sequence[RatePoint], of: Callable[[RatePoint], dict[str, float]]) -> list[str]:
    return list(dict.fromkeys(name for r in rates for name in of(r)))


def _rate_plot(
    title: str, y_axis: Axis, found: Sequence[Measured], at: str | None, exact: float | None = None
) -> Markup:
    def bits(r: RatePoint) -> float:
        return r.nominal_bits if at is None else r.effective_bits[at]

    curves = []
    if exact is not None:
        ends = [end(bits(r) for r, _, _ in found) for end in (min, max)]
        curves.append(Curve("exact cache", "exact", [(x, exact) for x in ends], dots=False))
    prefills = sorted({r.prefill for r, _, _ in found})
    for ours, prefill in [(ours, prefill) for ours in (True, False) for prefill in prefills]:
        part = sorted((f for f in found if f[0].ours is ours and f[0].prefill == prefill), key=lambda f: bits(f[0]))
        if not part:
            continue
        known = [interval for _, _, interval in part if interval]
        curves.append(
            Curve(
                ("ours" if ours else "others") + (f", {prefill} prefill" if len(prefills) > 1 else ""),
                {(True, "coded"): "coded", (True, "exact"): "third", (False, "coded"): "value"}.get(
                    (ours, prefill), "fourth"
                ),
                [(bits(r), value) for r, value, _ in part],
                [low for low, _ in known] if len(known) == len(part) else None,
                [high for _, high in known] if len(known) == len(part) else None,
                joined=ours,
                names=[r.label for r, _, _ in part],
            )
        )
    label = "nominal bits an element" if at is None else f"effective bits an element, {serving(at)} tokens"
    return plot(f"{title} against bits", Axis(label, log=True, ticks=BIT_TICKS), y_axis, curves)


def recall_figures(exact: Evaluation | None, coded: Evaluation | None) -> list[Figure]:
    """Recall by length, and by length and depth."""
    rows_of = {
        label: evaluation["recall"]["lengths"]
        for label, evaluation in (("exact", exact), ("coded", coded))
        if evaluation and evaluation["recall"] and evaluation["recall"]["lengths"]
    }
    if "coded" not in rows_of:
        return []
    series = []
    for label, rows in rows_of.items():
        intervals = [row["interval"] or [0.0, 1.0] for row in rows]
        rates = [row["rate"] or 0.0 for row in rows]
        series.append(Series(label, label, rates, [low for low, _ in intervals], [high for _, high in intervals]))
    ticks = [tokens(row["tokens"]) for row in rows_of["coded"]]
    by_length = bars("Recall by context length", "tokens in the context", Axis("recall", high=1.0), ticks, series)
    figures = [Figure("Recall by context length", "Higher is better; whiskers are 95 % intervals.", by_length)]
    for label, rows in rows_of.items():
        depths = list(rows[0]["by_depth"])
        cells = [(tokens(row["tokens"]), [row["by_depth"][d]["rate"] for d in depths]) for row in rows]
        axes = ("tokens", "where the fact stands", "recall")
        chart = heatmap(f"Recall by length and depth, {label}", axes, depths, cells, label, full=1.0)
        figures.append(Figure(f"Recall by depth, {label} cache", "By context length and place of the fact.", chart))
    return figures


def size_figures(sizes: Sequence[CacheSize], nominal_bits: float) -> list[Figure]:
    """Memory and bits against context length."""
    if not sizes:
        return []
    x_axis = Axis(
        "tokens in the context", log=True, ticks=[(s.context_tokens, tokens(s.context_tokens)) for s in sizes]
    )

    def curve(label: str, style: str, of: Callable[[CacheSize], float]) -> Curve:
        return Curve(label, style, [(s.context_tokens, of(s)) for s in sizes])

    memory = [
        curve("16 bit", "exact", lambda s: s.plain_bytes),
        curve("FP8", "third", lambda s: s.plain_bytes / 2),
        curve("coded, first sequence", "coded", lambda s: s.code_bytes + s.exact_bytes + s.codebook_bytes),
        curve("coded, each further", "value", lambda s: s.code_bytes + s.exact_bytes),
    ]
    bits = [
        curve("first sequence", "coded", lambda s: s.effective_bits),
        curve("each further", "value", sequence_bits),
        curve("nominal", "exact", lambda s: nominal_bits),
    ]
    held = [y for c in memory for _, y in c.points]
    powers = range(math.floor(math.log2(min(held))), math.ceil(math.log2(max(held))) + 1)
    step = max(1, math.ceil(len(powers) / 6))
    byte_axis = Axis("bytes", log=True, ticks=[(2.0**k, size(2.0**k)) for k in powers if k % step == 0], text=size)
    return [
        Figure(
            "Memory against context length",
            "All layers. The first sequence brings the codebooks, which each further one shares.",
            plot("Memory against context length", x_axis, byte_axis, memory),
        ),
        Figure(
            "Bits an element against context length",
            "Everything counted: codes, exact tokens and, of the first sequence, codebooks.",
            plot("Effective bits against context length", x_axis, Axis("bits an element", log=True), bits),
        ),
    ]


def sequence_bits(entry: CacheSize) -> float:
    """Bits an element of a further sequence, which finds the codebooks there."""
    return 16 * (entry.code_bytes + entry.exact_bytes) / entry.plain_bytes


def paid_back_from(entry: CacheSize, rival_bytes: float) -> int | None:
    """Sequences from which the codebooks and all coded sequences take less than as many of ``rival_bytes`` each; None
    if they never do.
    """
    saved = rival_bytes - entry.code_bytes - entry.exact_bytes
    return None if saved <= 0 else math.floor(entry.codebook_bytes / saved) + 1


def codebook_figures(metrics: BuildMetrics) -> list[Figure]:
    """Distortion by stage, layer, head and position, and which codewords are used."""
    if metrics.profile:
        return [*_profile_figures(metrics.profile)]
    if metrics.distortion:
        return _common_figures(
            [(d.layer, d.kind, d.relative_mse_by_stage, d.usage_by_stage) for d in metrics.distortion]
        )
    return []


Coded = tuple[int, Kind, list[float], list[float]]  # layer, kind, error by stage, share of codewords used by stage


def _common_figures(entries: Sequence[Coded]) -> list[Figure]:
    layers = sorted({layer for layer, *_ in entries})
    by_layer = []
    for kind in _kinds(entries):
        last = {layer: errors[-1] for layer, of, errors, _ in entries if of == kind}
        by_layer.append(Series(f"{kind}s", kind, [last.get(layer, 0.0) for layer in layers]))
    stages = {kind: [errors for _, of, errors, _ in entries if of == kind] for kind in _kinds(entries)}
    figures = [
        Figure(
            "Error after each stage",
            "Mean over layers.",
            _by_stage("Error by stage", Axis("error / energy", log=True), stages, LEAST_ERROR),
        ),
        Figure(
            "Error by layer",
            "After the last stage.",
            bars("Error by layer", "layer", Axis("error / energy"), [str(layer) for layer in layers], by_layer),
        ),
    ]
    for kind in _kinds(entries):
        rows = [(str(layer), used) for layer, of, _, used in entries if of == kind]
        columns = [str(r + 1) for r in range(max(len(used) for _, used in rows))]
        chart = heatmap(f"Codewords used, {kind}s", ("layer", "stage", "share"), columns, rows, kind, full=1.0)
        figures.append(Figure(f"Codewords in use, {kind}s", "Share of a stage's 256 that any vector took.", chart))
    return figures


def _profile_figures(profiles: Sequence[LayerProfile]) -> list[Figure]:
    entries: list[Coded] = [(p.layer, p.kind, p.profile.by_stage, p.profile.used_by_stage) for p in profiles]
    figures = _common_figures(entries)
    positions = []
    for kind in _kinds(entries):
        of_kind = [p.profile.by_position for p in profiles if p.kind == kind]
        means = [sum(entry.error for entry in column) / len(column) for column in zip(*of_kind, strict=True)]
        positions.append(Curve(f"{kind}s", kind, list(enumerate(means))))
    buckets = profiles[0].profile.by_position
    ticks = [(float(i), f"{b.start}-{b.stop - 1}") for i, b in enumerate(buckets)]
    chart = plot("Error by position", Axis("position in the sequence", ticks=ticks), Axis("error / energy"), positions)
    figures.insert(2, Figure("Error by position", "Of the token in its sequence, mean over layers.", chart))
    for kind in reversed(_kinds(entries)):
        rows = [(str(p.layer), p.profile.by_head) for p in profiles if p.kind == kind]
        columns = [str(h) for h in range(max(len(heads) for _, heads in rows))]
        chart = heatmap(f"Error by KV head, {kind}s", ("layer", "KV head", "error / energy"), columns, rows, kind)
        figures.insert(3, Figure(f"Error by KV head, {kind}s", "After the last stage.", chart))

    def usage(of: Callable[[LayerProfile], list[float]]) -> dict[Kind, list[list[float]]]:
        return {kind: [of(p) for p in profiles if p.kind == kind] for kind in _kinds(entries)}

    entropy = _by_stage("Entropy by stage", Axis("bits a code", high=8.0), usage(lambda p: p.profile.entropy_by_stage))
    top = _by_stage(
        "Most used codeword", Axis("share of vectors", high=1.0), usage(lambda p: p.profile.top_share_by_stage)
    )
    figures += [
        Figure("Entropy of the codes", "Mean over layers; 8 bits is even use of all 256 codewords.", entropy),
        Figure("Most used codeword", "Share of the vectors that it takes, mean over layers.", top),
    ]
    return figures


def _kinds(entries: Sequence[Coded]) -> list[Kind]:
    present = {entry[1] for entry in entries}
    return [kind for kind in KINDS if kind in present]


def _by_stage(title: str, y_axis: Axis, by_kind: dict[Kind, list[list[float]]], least: float = 0.0) -> Markup:
    """Means over layers; layers may differ in their number of stages, so each stage's is over those that have it."""
    curves = []
    for kind, layers in by_kind.items():
        columns = [[row[r] for row in layers if r < len(row)] for r in range(max(len(row) for row in layers))]
        points = [(r + 1.0, max(least, sum(column) / len(column))) for r, column in enumerate(columns)]
        curves.append(Curve(f"{kind}s", kind, points))
    most = max(len(c.points) for c in curves)
    ticks = [(r + 1.0, str(r + 1)) for r in range(most)]
    return plot(title, Axis("stage", ticks=ticks), y_axis, curves)
