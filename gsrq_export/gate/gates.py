"""The gates: a measured artifact held against the unquantized run and the accepted artifact, unit by unit.

Recovery gates ask for proof: ACCEPT if even the pessimistic bound is within the limit, REGRESSION if even the
optimistic bound is beyond it, INCOMPLETE between, where the sample is too small to tell. Gates against the accepted
artifact ask whether a worsening is shown. All compare unrounded numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from gsrq_export.gate.baseline import Baseline, Gates, Hits
from gsrq_export.gate.bounds import loss_bounds, mean_bounds, sign_test
from gsrq_export.gate.verdict import GateResult, Verdict, show

IDENTICAL_NLL = 1e-4  # nats: float16 buffers and another framework alone stay below, codes of a few bits do not


@dataclass(frozen=True)
class Measured:
    """What the check measured on the artifact.

    Attributes:
        window_nll: the mean of each window, nats a token.
        recall: as the baseline's.
        coded_tokens: the fewest tokens that are in codes at the end of a window or of a recall prompt.
        cache_bytes: one sequence's cache at the baseline's ``cache_tokens``.
    """

    window_nll: list[float]
    recall: list[Hits]
    coded_tokens: int
    cache_bytes: int


def judge(baseline: Baseline, measured: Measured, gates: Gates) -> list[GateResult]:
    """Every gate's result. Figures that are missing or not finite fail their gate; nothing raises."""
    results = [_codes_in_use(baseline, measured)]
    exact, accepted = baseline.exact, baseline.accepted
    pairs = len(measured.window_nll), len(exact.window_nll)
    problem = _uncounted("windows", *pairs) or _not_finite(measured.window_nll)
    if not problem and len(measured.window_nll) < 2:
        problem = "one window has no spread; record with more"
    names = ("perplexity-recovery", "perplexity-plausible", "perplexity-against-accepted")
    if problem:
        results += [GateResult(name, Verdict.INCOMPLETE, problem) for name in names]
    else:
        ours = np.array(measured.window_nll, np.float64)
        loss = (ours - np.array(exact.window_nll)).tolist()
        results.append(_perplexity_recovery(names[0], loss, gates))
        results.append(_perplexity_plausible(names[1], loss, gates))
        worse = (ours - np.array(accepted.window_nll)).tolist()
        results.append(_perplexity_against_accepted(names[2], worse, gates))
    found = {row.tokens: row.hits for row in measured.recall}
    for before, agreed in zip(exact.recall, accepted.recall, strict=True):
        results += _recall_gates(before, agreed, found.get(before.tokens, ""), gates)
    results.append(_memory(baseline, measured, gates))
    return results


def _codes_in_use(baseline: Baseline, measured: Measured) -> GateResult:
    """The exact run must not pass for the artifact."""
    name = "codes-in-use"
    figures = {"coded_tokens": float(measured.coded_tokens)}
    if measured.coded_tokens < 1:
        return GateResult(
            name,
            Verdict.ANOMALOUS,
            "the artifact's window holds all tokens of a window or case: the exact cache was measured, not the codes",
            figures,
        )
    problem = _uncounted("windows", len(measured.window_nll), len(baseline.exact.window_nll))
    if problem or not np.isfinite(measured.window_nll).all():
        return GateResult(name, Verdict.INCOMPLETE, problem or "a window's likelihood is not finite", figures)
    largest = float(np.abs(np.array(measured.window_nll) - np.array(baseline.exact.window_nll)).max())
    figures |= {"value": largest, "limit": IDENTICAL_NLL}
    if largest < IDENTICAL_NLL:
        return GateResult(
            name,
            Verdict.ANOMALOUS,
            f"no window differs from the unquantized run by {IDENTICAL_NLL:g} nats (at most {largest:.2g}): "
            "codes are claimed, and nothing shows them",
            figures,
        )
    return GateResult(
        name,
        Verdict.ACCEPT,
        f"at least {measured.coded_tokens} tokens of each window and case are in codes; windows differ by up to "
        f"{largest:.2g} nats from the unquantized run",
        figures,
    )


def _perplexity_recovery(name: str, loss: list[float], gates: Gates) -> GateResult:
    limit = gates.max_perplexity_increase
    value, lower, upper = _relative_bounds(loss, gates.confidence)
    verdict, detail = _proven(value, lower, upper, limit, "perplexity", gates.confidence, "windows")
    return GateResult(name, verdict, detail, _figures(value, lower, upper, limit), "perplexity")


def _perplexity_plausible(name: str, loss: list[float], gates: Gates) -> GateResult:
    limit = -gates.max_perplexity_gain
    value, lower, upper = _relative_bounds(loss, gates.anomaly_confidence)
    odd = upper < limit
    seen = show(upper, "perplexity")
    return GateResult(
        name,
        Verdict.ANOMALOUS if odd else Verdict.ACCEPT,
        f"better than the unquantized model by more than noise: at most {seen}, believed down to "
        f"{show(limit, 'perplexity')}"
        if odd
        else f"not better than the unquantized model beyond noise (bound {seen})",
        _figures(value, lower, upper, limit),
        "perplexity",
    )


def _perplexity_against_accepted(name: str, worse: list[float], gates: Gates) -> GateResult:
    limit = gates.perplexity_tolerance
    value, lower, upper = _relative_bounds(worse, gates.confidence)
    shown = lower > limit
    return GateResult(
        name,
        Verdict.REGRESSION if shown else Verdict.ACCEPT,
        f"{show(value, 'perplexity')} against the accepted artifact, between {show(lower, 'perplexity')} and "
        f"{show(upper, 'perplexity')} at {100 * gates.confidence:g} % confidence: a worsening beyond "
        f"{show(limit, 'perplexity')} is {'shown' if shown else 'not shown'}",
        _figures(value, lower, upper, limit),
        "perplexity",
    )


def _recall_gates(exact: Hits, accepted: Hits, hits: str, gates: Gates) -> list[GateResult]:
    names = [f"recall-{kind}-{exact.tokens}" for kind in ("recovery", "plausible", "against-accepted")]
    n = len(exact.hits)
    problem = _uncounted(f"cases at {exact.tokens} tokens", len(hits), n)
    if problem:
        return [GateResult(name, Verdict.INCOMPLETE, problem) for name in names]
    counts = f"{hits.count('1')} of {n} right, unquantized {exact.hits.count('1')}, accepted {accepted.hits.count('1')}"
    lost, gained = _changes(exact.hits, hits)
    lower, upper = loss_bounds(lost, gained, n, gates.confidence)
    value, limit = (lost - gained) / n, gates.max_recall_loss
    figures = {**_figures(value, lower, upper, limit), "lost": float(lost), "gained": float(gained)}
    if exact.hits.count("1") / n <= limit:
        verdict, detail = Verdict.INCOMPLETE, f"the unquantized model has no more than {limit:g} to lose"
    else:
        verdict, detail = _proven(value, lower, upper, limit, "recall", gates.confidence, "cases")
    results = [GateResult(names[0], verdict, f"{counts}; {detail}", figures, "recall")]

    chance = sign_test(gained, lost)
    odd = chance < 1 - gates.anomaly_confidence
    results.append(
        GateResult(
            names[1],
            Verdict.ANOMALOUS if odd else Verdict.ACCEPT,
            f"{gained} cases right that the unquantized model has wrong, {lost} the other way: p = {chance:.3g}"
            + (", more than chance would give" if odd else ""),
            {"value": chance, "limit": 1 - gates.anomaly_confidence, "lost": float(lost), "gained": float(gained)},
        )
    )
    lost, gained = _changes(accepted.hits, hits)
    chance = sign_test(lost, gained)
    worse = chance < 1 - gates.confidence
    results.append(
        GateResult(
            names[2],
            Verdict.REGRESSION if worse else Verdict.ACCEPT,
            f"{lost} cases lost and {gained} gained against the accepted artifact: p = {chance:.3g}"
            + (", a worsening" if worse else ", no worsening shown"),
            {"value": chance, "limit": 1 - gates.confidence, "lost": float(lost), "gained": float(gained)},
        )
    )
    return results


def _memory(baseline: Baseline, measured: Measured, gates: Gates) -> GateResult:
    """Quality that is bought with more memory is no recovery."""
    accepted = baseline.accepted
    limit = accepted.cache_bytes * (1 + gates.max_memory_increase)
    over = measured.cache_bytes > limit
    return GateResult(
        "memory-against-accepted",
        Verdict.REGRESSION if over else Verdict.ACCEPT,
        f"{measured.cache_bytes:,} bytes of cache at {accepted.cache_tokens} tokens, accepted {accepted.cache_bytes:,}",
        {"value": float(measured.cache_bytes), "limit": limit},
        "bytes",
    )


def _proven(
    value: float, lower: float, upper: float, limit: float, unit: str, confidence: float, units: str
) -> tuple[Verdict, str]:
    """Loss against its limit, by its bounds."""
    sure = f"at {100 * confidence:g} % confidence"
    loss = f"a loss of {show(value, unit)}"
    if upper <= limit:
        return Verdict.ACCEPT, f"{loss}, at most {show(upper, unit)} {sure}, within {show(limit, unit)}"
    if lower > limit:
        return Verdict.REGRESSION, f"{loss}, at least {show(lower, unit)} {sure}, beyond {show(limit, unit)}"
    return (
        Verdict.INCOMPLETE,
        f"{loss}, between {show(lower, unit)} and {show(upper, unit)} {sure}: too few {units} to tell whether it is "
        f"within {show(limit, unit)}",
    )


def _figures(value: float, lower: float, upper: float, limit: float) -> dict[str, float]:
    return {"value": value, "lower": lower, "upper": upper, "limit": limit}


def _relative_bounds(nats: list[float], confidence: float) -> tuple[float, float, float]:
    """Mean and its bounds, as relative changes of perplexity."""
    lower, upper = mean_bounds(nats, confidence)
    return _relative(float(np.mean(nats))), _relative(lower), _relative(upper)


def _relative(nats: float) -> float:
    """Of a perplexity; the greatest that a float can tell where it is beyond that."""
    return math.expm1(min(nats, 700.0))


def _changes(before: str, after: str) -> tuple[int, int]:
    pairs = list(zip(before, after, strict=True))
    return pairs.count(("1", "0")), pairs.count(("0", "1"))


def _uncounted(what: str, have: int, want: int) -> str:
    return "" if have == want else f"{have} {what} measured, the baseline has {want}"


def _not_finite(values: list[float]) -> str:
    bad = sum(not math.isfinite(value) for value in values)
    return f"{bad} of {len(values)} windows have a likelihood that is NaN or infinite" if bad else ""
