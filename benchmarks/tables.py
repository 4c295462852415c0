"""Writes the tables of the documents, and their plots, from the JSON in benchmarks/results/ and from the recipes.

python benchmarks/tables.py            # rewrite the tables between the markers
python benchmarks/tables.py --check    # exit status 1 if a document differs
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from environment import ROOT
from gskm_gaussian import plots, spread, standalone

from gsrq_export.accounting import LayerShape, effective_bits, footprint, nominal_bits, token_bytes
from gsrq_export.build.source import Source
from gsrq_export.cache.rule import CacheRule
from gsrq_export.recipe import Recipe, load_recipe
from gsrq_export.recipe_files import bundled_recipes
from gsrq_export.report.svg import Axis, Series, bars

RESULTS = ROOT / "benchmarks/results"
RULE = CacheRule(4, 64, 64)
CONTEXTS = (2048, 8192, 131072)
MEMORY_CONTEXTS = (8192, 32768, 131072)  # or as many tokens as the recipe's longest
SEQUENCES = (1, 32)  # that share the codebooks


def sequence_bits(nominal: float, context: int) -> float:
    """Bits an element of one more sequence: codes and exact slots, without the codebooks that all share."""
    return (RULE.coded(context) * nominal + RULE.exact_slots * 16) / context


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def rate(row: dict[str, Any]) -> str:
    low, high = row["interval"]
    return f"{row['rate']:.2f} [{low:.2f}, {high:.2f}]"


def quality(data: dict[str, Any]) -> str:
    lengths = [row["tokens"] for row in data["exact"]["recall"]]
    texts = [k for k in data["exact"] if k.startswith("perplexity")]
    header = ["bits", "D", "R", "traffic", "method", "metric", "beam"]
    header += [*texts, *(f"recall@{n}" for n in lengths), "distortion"]

    def figures(found: dict[str, Any]) -> list[str]:
        return [f"{found[t]['perplexity']:.2f}" for t in texts] + [rate(row) for row in found["recall"]]

    rows = [["16", "", "", "", "exact", "", "", *figures(data["exact"]), ""]]
    order = sorted(data["rows"], key=lambda r: (-r["nominal_bits"], -r["setting"]["width"], r["setting"]["traffic"]))
    for row in order:
        s = row["setting"]
        words = [f"{row['nominal_bits']:g}", str(s["width"]), str(s["stages"]), s["traffic"], s["method"], s["metric"]]
        rows.append(
            [
                *words,
                str(s["beam"]),
                *figures(row),
                "" if row["held_out_distortion"] is None else f"{row['held_out_distortion']:.3f}",
            ]
        )
    return table(header, rows)


def bits(data: dict[str, Any]) -> str:
    header = ["nominal", "D", "R"]
    header += [f"effective, {n // 1024}k" for n in CONTEXTS] + [f"a sequence more, {n // 1024}k" for n in CONTEXTS]
    seen: dict[tuple[float, int, int], list[str]] = {}
    for row in data["rows"]:
        s, nominal = row["setting"], row["nominal_bits"]
        cells = [f"{row['effective_bits'][str(n)]:.2f}" for n in CONTEXTS]
        cells += [f"{sequence_bits(nominal, n):.2f}" for n in CONTEXTS]
        seen[nominal, s["width"], s["stages"]] = [f"{nominal:g}", str(s["width"]), str(s["stages"]), *cells]
    return table(header, [seen[key] for key in sorted(seen, key=lambda k: (-k[0], -k[1]))])


def depths(data: dict[str, Any]) -> str:
    """Recall by depth of the exact model and of the one-bit settings over both heads."""
    chosen = [("exact", data["exact"])]
    for row in data["rows"]:
        s = row["setting"]
        if row["nominal_bits"] == 1 and s["width"] == 256 and s["method"] == "gskm" and s["beam"] == 1:
            chosen.append((f"1 bit, {s['traffic']}, metric {s['metric']}", row))
    names = list(chosen[0][1]["recall"][0]["by_depth"])
    header = ["", *(f"{r['tokens']}, {name}" for r in chosen[0][1]["recall"] for name in names)]
    rows = [
        [label, *(f"{r['by_depth'][n]['correct']}/{r['by_depth'][n]['cases']}" for r in found["recall"] for n in names)]
        for label, found in chosen
    ]
    return table(header, rows)


def decode(data: dict[str, Any]) -> str:
    """Beside ours, where a run has them, times of the same turns: of codes by token, and of keys coded before RoPE."""
    by_token = {(r["shape"], r["tokens"]): r["gsrq_ms"] for r in data["rows"] if r.get("code_order") == "token"}
    shown = [row for row in data["rows"] if row.get("code_order") != "token"]
    header = ["layer", "cached tokens", "ours, ms", "GroupQueryAttention, ms", "faster", "cache smaller than fp32"]
    rows = [
        [
            row["shape"],
            str(row["tokens"]),
            f"{row['gsrq_ms']:.2f}",
            f"{row['gqa_ms']:.2f}",
            f"**{row['speed_ratio']:.2f}x**",
            f"{row['cache_ratio']:.1f}x",
        ]
        for row in shown
    ]
    if by_token:
        header.append("ours, codes by token, ms")
        for cells, row in zip(rows, shown, strict=True):
            found = by_token.get((row["shape"], row["tokens"]))
            cells.append("" if found is None else f"{found:.2f}")
    if any(row.get("rotated") for row in shown):
        header.append("keys before RoPE, ms")
        for cells, row in zip(rows, shown, strict=True):
            cells.append(f"{row['pre_rope_ms']:.2f}" if row["rotated"] else "")
    return table(header, rows)


def demo(data: dict[str, Any]) -> str:
    rows = [["all", f"{data['wall_seconds']:.0f}"]]
    rows += [[name, f"{seconds:.0f}"] for name, seconds in data["stages_seconds"].items()]
    rows.append(["peak resident memory", f"{data['peak_resident_bytes'] / 1e9:.2f} GB"])
    return table(["stage", "seconds"], rows)


def large_model(data: dict[str, Any]) -> str:
    header = ["run", "stage", "peak resident memory, GB", "of it private, GB", "seconds"]
    rows = []
    for name, key in (
        ("all 32 layers", "build"),
        ("one full shard, two layers", "one_full_shard_through_two_layers"),
    ):
        run = data.get(key, {"stages": {}})
        for stage, found in run["stages"].items():
            if stage != "traffic":
                peaks = [f"{found[f'peak_{kind}'] / 1e9:.2f}" for kind in ("resident_bytes", "private_bytes_sampled")]
                what = f"{name}, {run['sequences']} x {run['sequence_length']} tokens"
                rows.append([what, stage, *peaks, f"{found['seconds']:.0f}"])
    return table(header, rows)


def gskm(data: dict[str, Any]) -> str:
    """Held-out distortion after the last stage: mean and standard deviation over the seeds."""
    names = list(data["rows"][0]["methods"])
    header = ["D", "stages", "slope", *names, "GSKM, beam 4"]

    def cell(runs: list[dict[str, Any]]) -> str:
        mean, deviation = spread([run["held_out"][-1] for run in runs])
        return f"{mean:.4f} ± {deviation:.4f}"

    rows = [
        [
            *(str(row["dimension"]), str(row["stages"]), f"{row['slope']:g}"),
            *(cell(row["methods"][name]) for name in names),
            f"{spread([run['held_out_beam_4'] for run in row['methods']['GSKM']])[0]:.4f}",
        ]
        for row in data["rows"]
    ]
    return table(header, rows)


def gskm_use(data: dict[str, Any]) -> str:
    """Share of the training vectors in the largest cluster, mean over stages and seeds."""
    names = list(data["rows"][0]["methods"])
    shares = [
        [spread([v for run in row["methods"][name] for v in run["top_share"]])[0] for name in names]
        for row in data["rows"]
    ]
    rows = [
        [str(row["dimension"]), f"{row['slope']:g}", *(f"{100 * share:.1f} %" for share in of)]
        for row, of in zip(data["rows"], shares, strict=True)
    ]
    return table(["D", "slope", *names], rows)


def tune(data: dict[str, Any]) -> str:
    header = ["budget", "effective bits", "KL", "KL added up", "KL of answers", "added up", "perplexity", "recall"]
    rows = []
    for row in data["found"]:
        low, high = row["perplexity_interval"]
        figures = [f"{row['perplexity']:.2f} [{low:.2f}, {high:.2f}]"]
        low, high = row["recall_interval"]
        figures.append(f"{row['recall']:.2f} [{low:.2f}, {high:.2f}]")
        if "kl" not in row:
            rows.append([row["budget"], "16", "", "", "", "", *figures])
            continue
        pairs = [
            f"{row[of][part]:.4f}"
            for part in ("kl", "answer_kl")
            for of in ("kl", "kl_added_up")
            if row[of][part] is not None
        ]
        pairs += [""] * (4 - len(pairs))
        rows.append([row["budget"], f"{row['effective_bits']:.3f}", *pairs, *figures])
    return table(header, rows)


def ablation(data: dict[str, Any]) -> str:
    """A row a setting: losses over the exact cache of the same run."""
    texts = [k for k in data["runs"][0]["exact"] if k.startswith("perplexity")]
    lengths = [row["tokens"] for row in data["runs"][0]["exact"]["recall"]]
    header = ["run", "bits", "means", *(f"{t}, over exact" for t in texts), *(f"recall@{n}" for n in lengths)]
    rows = []
    for number, run in enumerate(data["runs"], 1):
        for row in sorted(run["rows"], key=lambda r: -r["bits"]):
            ratios = [row[t]["perplexity"] / run["exact"][t]["perplexity"] for t in texts]
            cells = [f"{100 * (ratio - 1):+.2f} %" for ratio in ratios] + [rate(found) for found in row["recall"]]
            rows.append([str(number), f"{row['bits']:g}", row["setting"]["name"], *cells])
    return table(header, rows)


UNWEIGHTED = "-unweighted"  # ends the ids of our rows without weights by gradients, where a file has both kinds


def of_either_kind(rows: list[dict[str, Any]], weighted: bool) -> list[dict[str, Any]]:
    """The rows, of ours with and without weights by gradients those without; weighted: such pairs alone."""
    ids = {row["id"] for row in rows}
    twins = {id for id in ids if id + UNWEIGHTED in ids}
    if weighted:
        return [row for row in rows if row["id"].removesuffix(UNWEIGHTED) in twins]
    return [row for row in rows if row["id"] not in twins]


def comparison(data: dict[str, Any], prefill: str = "coded", weighted: bool = False, rivalled: bool = True) -> str:
    """A row a method, by effective bits where 64 sequences share the codebooks.

    weighted: only rows with weights by gradients and their twins without; otherwise those twins stand for both.
    rivalled: say of our rows which rivals are better.
    """
    points = ("8192x1", "8192x64", "131072x1")
    exact = data["unquantized"][prefill]
    texts = list(exact)
    lengths = [row["tokens"] for row in exact[texts[0]]["recall"]["lengths"]]
    header = ["method", "nominal", *(f"effective {p}" for p in points), *(f"perplexity {t}, over exact" for t in texts)]
    header += [*(f"recall@{n}" for n in lengths), *["better with as few bits"] * rivalled]
    rows = []
    names = names_of(data["rows"])
    chosen = [row for row in of_either_kind(data["rows"], weighted) if row["prefill"] == prefill]
    rivals = [row for row in chosen if not row["ours"]]
    for row in sorted(chosen, key=lambda r: -r["effective_bits"]["8192x64"]):
        ratios = [row["metrics"][t]["perplexity"]["perplexity"] / exact[t]["perplexity"]["perplexity"] for t in texts]
        bits = [f"{row['nominal_bits']:.3f}", *(f"{row['effective_bits'][p]:.2f}" for p in points)]
        recalls = [rate(found) for found in row["metrics"][texts[0]]["recall"]["lengths"]]
        losses = [f"{100 * (ratio - 1):+.2f} %" for ratio in ratios]
        better = [better_rivals(row, rivals) if row["ours"] else ""] * rivalled
        rows.append([names[row["id"]], *bits, *losses, *recalls, *better])
    return table(header, rows)


def better_rivals(row: dict[str, Any], rivals: list[dict[str, Any]], point: str = "8192x64") -> str:
    """Which rivals with as many effective bits at most are better than a row, and in what."""

    def losses(of: dict[str, Any]) -> dict[str, float]:
        recall = next(iter(of["metrics"].values()))["recall"]["lengths"]
        found = {text: float(metrics["perplexity"]["perplexity"]) for text, metrics in of["metrics"].items()}
        return found | {f"recall@{at['tokens']}": -at["rate"] for at in recall}

    mine, said = losses(row), []
    for rival in rivals:
        if rival["effective_bits"][point] <= row["effective_bits"][point]:
            theirs = losses(rival)
            if where := [name for name in mine if theirs[name] < mine[name]]:
                said.append(f"{rival['label']}: {', '.join(where)}")
    return "; ".join(said) or "none"


def names_of(rows: list[dict[str, Any]]) -> dict[str, str]:
    """By id. Where there are rows of ours with and without weights by gradients, those with them say so."""
    both = any(row["id"].endswith(UNWEIGHTED) for row in rows)
    names = {}
    for row in rows:
        label = row["label"].removeprefix("ours: ")
        if row["ours"] and both:
            label = label.removesuffix(UNWEIGHTED) if label.endswith(UNWEIGHTED) else f"{label}, gradient weights"
        names[row["id"]] = f"**{label}**" if row["ours"] else label
    return names


def tasks(data: dict[str, Any]) -> str:
    """Tasks that the exact model can do at least half of, and fidelity to it, of the first text."""
    exact = next(iter(data["unquantized"]["coded"].values()))
    able = [i for i, task in enumerate(exact["tasks"]) if task["score"] >= 0.5]
    measures = {
        "top1_agreement": "top-1 agreement",
        "kl": "KL, nats a token",
        "agreed_tokens": "tokens until it departs",
    }
    header = [
        "method",
        "effective 8192x64",
        *(f"{exact['tasks'][i]['task']}@{exact['tasks'][i]['tokens']}" for i in able),
    ]

    def cells(found: dict[str, Any]) -> list[str]:
        each = [found["tasks"][i] for i in able]
        return [f"{task['score']:.2f} [{task['interval'][0]:.2f}, {task['interval'][1]:.2f}]" for task in each]

    rows = [["exact", "16", *cells(exact), *("" for _ in measures)]]
    names = names_of(data["rows"])
    for row in sorted(of_either_kind(data["rows"], weighted=False), key=lambda r: -r["effective_bits"]["8192x64"]):
        found = next(iter(row["metrics"].values()))
        figures = [f"{found['fidelity'][name]['mean']:.{1 if name == 'agreed_tokens' else 4}f}" for name in measures]
        rows.append([names[row["id"]], f"{row['effective_bits']['8192x64']:.2f}", *cells(found), *figures])
    return table([*header, *measures.values()], rows)


def int8(data: dict[str, Any]) -> str:
    """Rows of ours in pairs, as trained and with int8 codewords: what rounding changes on the same windows."""
    rows = {row["id"]: row["metrics"] for row in data["rows"] if row["prefill"] == "coded"}
    exact = data["unquantized"]["coded"]
    texts = list(exact)
    lengths = [found["tokens"] for found in exact[texts[0]]["recall"]["lengths"]]
    header = ["", *(f"perplexity {t}, over exact" for t in texts), *(f"recall@{n}" for n in lengths)]
    lines = []
    for id in (id for id in rows if f"{id}-int8" in rows):
        for name in (id, f"{id}-int8"):
            ratios = [rows[name][t]["perplexity"]["perplexity"] / exact[t]["perplexity"]["perplexity"] for t in texts]
            recalls = [rate(found) for found in rows[name][texts[0]]["recall"]["lengths"]]
            lines.append([name, *(f"{100 * (ratio - 1):+.2f} %" for ratio in ratios), *recalls, *("" for _ in texts)])
        for t in texts:
            pairs = zip(*(rows[name][t]["perplexity"]["window_nll"] for name in (f"{id}-int8", id)), strict=True)
            mean, deviation = spread([one - other for one, other in pairs])
            error = deviation / len(rows[id][t]["perplexity"]["window_nll"]) ** 0.5
            lines[-1][texts.index(t) - len(texts)] = f"{mean:+.4f} ± {error:.4f}"
    return table([*header, *(f"nats a token more, {t}" for t in texts)], lines)


def cuda_decode(data: dict[str, Any]) -> str:
    torch = {(r["batch"], r["length"]): r for r in data["sdpa"]}
    rows = []
    for row in data["decode"]:
        found = torch[row["batch"], row["length"]]
        cells = [f"{row['batch']} x {row['length'] // 1024}k", row["setting"], f"{1e3 * row['attend_ms']:.0f}"]
        cells += [f"{1e3 * row['attend_pages_ms']:.0f}", f"{1e3 * row['bf16_floor_ms']:.0f}"]
        cells += [f"{1e3 * min(found['ms'].values()):.0f}"]
        cells += [f"**{row['over_bf16_floor']:.2f}**", f"{row['over_fastest_torch']:.2f}"]
        cells += [f"{row['relative_error']:.1e}", f"{1e3 * row['encode_block_ms']:.0f}"]
        rows.append([*cells, f"{100 * row['encode_share_of_a_step']:.1f} %"])
    header = [
        "batch x length",
        "setting",
        "ours, µs",
        "in pages, µs",
        "bf16 floor, µs",
        "torch bf16, µs",
        "over the floor",
        "over torch",
    ]
    return table([*header, "relative error", "coding a block, µs", "of a step"], rows)


def cuda_plot(data: dict[str, Any]) -> str:
    """A setting of each frame and torch's fastest attention, over the time that copying the bf16 cache takes."""
    shapes = [(r["batch"], r["length"]) for r in data["sdpa"]]
    found = {(r["setting"], r["batch"], r["length"]): r["over_bf16_floor"] for r in data["decode"] if r["int8"]}
    series = [Series("torch, bf16", "exact", [min(r["ms"].values()) / r["bf16_floor_ms"] for r in data["sdpa"]])]
    shown = ("1 bit, D 128 R 16", "1 bit, D 128 R 24 / 8, rotated", "0.375 bit, D 256 R 16 / 8, rotated")
    for name, style in zip(shown, ("coded", "value", "third"), strict=True):
        series.append(Series(name, style, [found[(name, *shape)] for shape in shapes]))
    ticks = [f"{b} x {n // 1024}k" for b, n in shapes]
    title = f"{data['environment']['gpu']}: decode attention over the time that copying a bf16 cache takes"
    return standalone(bars(title, "batch x cached tokens", Axis("time over the floor"), ticks, series))


def cuda_prefill(data: dict[str, Any]) -> str:
    rows = []
    for row in data["prefill"]:
        cells = [str(row["steps"]), "exact" if row["exact_prefill"] else "coded"]
        cells += [f"{row[name]:.1f}" for name in ("attend_ms", "torch_flash_ms", "encode_ms")]
        rows.append([*cells, f"**{row['attend_over_flash']:.2f}**", f"{row['encode_over_flash']:.2f}"])
    header = ["tokens", "prefill", "attention, ms", "torch flash bf16, ms", "coding, ms"]
    return table([*header, "attention over torch", "coding over torch"], rows)


def hosting(data: dict[str, Any]) -> str:
    rows = []
    for row in data["rows"]:
        cells = [f"{row['batch']} x {row['length'] // 1024}k", row["setting"]]
        names = ("operator_ms", "library_graph_ms", "torch_graph_ms", "library_eager_ms", "torch_eager_ms")
        cells += [f"{1e3 * row[name]:.0f}" for name in names]
        rows.append(
            [*cells, f"{row['library_graph_over_operator']:.2f}", f"**{row['torch_over_library_eager']:.1f}x**"]
        )
    header = ["batch x length", "setting", "operator, µs", "ours around it, µs", "torch around it, µs"]
    header += ["ours, by Python, µs", "torch, by Python, µs", "ours over operator", "torch over ours, by Python"]
    return table(header, rows)


def calibration(data: dict[str, Any]) -> str:
    shape, bf16 = data["shape"], data["rooflines"]["bf16_flops"] / 1e12
    train = data["train"]
    whole = {
        "step": f"GSKM training, {shape['stages']} stages of {train['iterations']} iterations",
        "flop": train["flop"],
        **{f"{way}_ms": 1e3 * train[f"{way}_seconds"] for way in ("fused", "torch")},
        **{f"{way}_{what}": train[f"{way}_{what}"] for way in ("fused", "torch") for what in ("tflops", "bytes")},
    }
    names = {"assign": "one assignment", "update": "one update", "encode, exact": "encoding, codes as float64's"}
    rows = []
    for row in (*data["steps"], whole, *data["encode"]):
        cells = [names.get(row["step"], row["step"]), f"{row['fused_ms']:.1f}", f"{row['torch_ms']:.1f}"]
        cells.append(f"**{row['torch_ms'] / row['fused_ms']:.1f}x**")
        rate = [f"{row['fused_tflops']:.0f}", f"{100 * row['fused_tflops'] / bf16:.0f} %"] if row["flop"] else ["", ""]
        rows.append([*cells, *rate, f"{row['fused_bytes'] / 2**30:.2f}", f"{row['torch_bytes'] / 2**30:.2f}"])
    header = ["step", "kernels, ms", "torch, ms", "faster", "TFLOP/s", "of bf16 products", "kernels, GiB", "torch, GiB"]
    held = (train["fused_held_out"][-1], train["torch_held_out"][-1])
    line = (
        f"{data['environment']['gpu']}; torch's bf16 product of the same run reaches {bf16:.0f} TFLOP/s. "
        f"GiB: beside the vectors. Held-out distortion {held[0]:.5f} with the kernels, {held[1]:.5f} with torch."
    )
    return f"{table(header, rows)}\n\n{line}\n\n![calibration on a GPU](img/cuda_calibration.svg)"


def calibration_plot(data: dict[str, Any]) -> str:
    rows = [*data["steps"], *data["encode"]]
    train = data["train"]
    faster = [*(row["times_faster"] for row in data["steps"]), train["times_faster"]]
    faster += [row["times_faster"] for row in data["encode"]]
    ticks = [row["step"] for row in rows]
    ticks.insert(len(data["steps"]), "GSKM training")
    title = f"{data['environment']['gpu']}: calibration of a layer, times faster than torch"
    return standalone(bars(title, "step", Axis("times faster"), ticks, [Series("CUDA kernels", "coded", faster)]))


def rivals(data: dict[str, Any]) -> str:
    """Rivals' bf16 decode; the torch column is the fastest backend."""
    names = list(data["rivals"][0]["found"])
    fastest = {(r["batch"], r["length"]): min(r["ms"].values()) for r in data["sdpa"]}
    rows = []
    for row in data["rivals"]:
        cells = [f"{row['batch']} x {row['length'] // 1024}k", f"{1e3 * row['bf16_floor_ms']:.0f}"]
        cells.append(f"{1e3 * fastest[row['batch'], row['length']]:.0f}")
        cells += [f"{1e3 * of['ms']:.0f}" if "ms" in (of := row["found"][name]) else "absent" for name in names]
        rows.append(cells)
    return table(["batch x length", "bf16 floor, µs", "torch, µs", *(f"{name}, µs" for name in names)], rows)


def ort_decode(data: dict[str, Any]) -> str:
    """A row a context: batch 1 and the largest batch of either graph; empty where it was not run."""
    found = {(r["attention"], r["length"], r["largest"]): r for r in data["rows"]}
    rows = []
    for length in dict.fromkeys(r["length"] for r in data["rows"]):
        for largest in (False, True):
            kinds = ("gsrq", "rotated", "gqa")
            pair = [found.get((attention, length, largest), {"batch": 0}) for attention in kinds]
            if not any(row["batch"] for row in pair):
                continue
            cells = [f"{length // 1024}k", "largest" if largest else "1"]
            for row in pair:
                some = bool(row["batch"])
                cells.append(str(row["batch"]) if some else "")
                cells.append(f"{row['mean_step_ms']:.1f}" if some else "")
                cells.append(f"**{row['tokens_a_second']:.0f}**" if some else "")
                cells.append(f"{row['memory_bytes'] / 1e9:.1f}" if some else "")
            rows.append(cells)
    header = ["context", "batch"]
    for name in ("coded", "coded after RoPE", "GQA fp16"):
        header += [f"{name}: rows", "step, ms", "tokens/s", "memory, GB"]
    return table(header, rows)


def ort_recall(data: dict[str, Any]) -> str:
    found = data["comparison"]
    header = ["", "perplexity", *(f"recall@{row['tokens']}" for row in found["recall"])]
    rows = [
        [run["backend"], f"{found['perplexity'][i]:.4f}", *(f"{row['rates'][i]:.3f}" for row in found["recall"])]
        for i, run in enumerate(data["runs"])
    ]
    return table(header, rows)


def scaling(data: dict[str, Any]) -> str:
    """Seconds and times faster than one process; a row a number of processes."""
    names = {"capture": "capture", "codebooks": "sharing codebooks", "rows": "sharing rows"}
    first = data["rows"][0]["parts"]
    rows = []
    for row in data["rows"]:
        parts = row["parts"]
        cells = [f"{parts[n]['seconds']:.1f} ({first[n]['seconds'] / parts[n]['seconds']:.2f}x)" for n in names]
        peak = max(part["peak_resident_bytes"] for part in parts.values())
        rows.append([str(row["processes"]), row["backend"] or "", *cells, f"{peak / 2**30:.2f}"])
    shape, found = data["shape"], data["environment"]
    where = found["gpu"] if data["device"] != "cpu" else f"{found['cpu']}, {found['cores']} cores"
    line = (
        f"{where}, torch {found['packages']['torch']}; {data['model']}, {shape['sequences'] * shape['length']:,} "
        f"tokens, D={shape['width']}, R={shape['stages']}, {shape['iterations']} iterations, one refit. "
        f"All runs wrote the same {data['files_equal']} files."
    )
    header = ["processes of one thread", "backend", *(f"{name}, s" for name in names.values())]
    return f"{line}\n\n{table([*header, 'most memory of a process, GiB'], rows)}"


FUZZERS = {
    "check": "libFuzzer, ASan, UBSan: attributes and shapes of the operator (`fuzz_check`)",
    "call": "libFuzzer, ASan, UBSan: whole calls on exact-sized memory, three instruction sets (`fuzz_call`)",
    "manifest": "atheris: manifest and the artifact it describes",
    "codebooks": "atheris: codebooks.safetensors",
    "recipe": "atheris: recipe, its YAML",
    "fields": "atheris: recipe, its values",
    "traffic": "atheris: traffic",
    "onnx": "atheris: ONNX file",
    "triton": "atheris: Triton configuration from a hostile graph",
}


def fuzzers(data: dict[str, Any]) -> str:
    """Each fuzzer's row of the last run that had it."""
    header = ["fuzzer", "executions", "of them accepted", "slowest input", "memory", "faults"]
    rows = []
    last = {row["name"]: row for run in data["runs"] for row in run["targets"]}
    for row in (last[name] for name in FUZZERS):
        memory = f"{row['peak_rss_mb']} MB"
        if row["grown_mb"] is not None:
            memory = f"{row['grown_mb']} MB more than torch and ONNX take"
        rows.append(
            [
                FUZZERS[row["name"]],
                f"{row['executions']:,}",
                "" if row["accepted"] is None else f"{row['accepted']:,}",
                f"{row['slowest_cpu_s']:.2f} s of CPU",
                memory,
                str(len(row["findings"])),
            ]
        )
    return table(header, rows)


def stated_recipes() -> list[tuple[Recipe, Sequence[LayerShape]]]:
    """The recipes that state their model's architecture, with its layers."""
    recipes = [load_recipe(file) for file in bundled_recipes()]
    return [(r, Source(r).stated_shapes()) for r in recipes if r.model.architecture is not None]


def models() -> str:
    rows = []
    for recipe, shapes in stated_recipes():
        one, first = footprint(recipe, shapes, 1), shapes[0]
        keys, values = recipe.codec.keys, recipe.codec.values
        rows.append(
            [
                recipe.name,
                f"{len(shapes)} x {first.num_kv_heads} x {first.head_dim}",
                f"D {keys.width}, R {keys.stages} + {values.stages}",
                f"{nominal_bits(recipe, shapes):g}",
                *(f"{n:,}" for n in (one.fp16, one.fp16 // 2, token_bytes(recipe, shapes))),
                f"{one.codebooks / 2**20:,.0f} MiB",
            ]
        )
    header = ["recipe", "layers x KV heads x head_dim", "codec, keys + values", "bits"]
    return table([*header, "bf16, bytes a token", "FP8", "coded", "codebooks"], rows)


def memory() -> str:
    rows = []
    for recipe, shapes in stated_recipes():
        limit = recipe.export.max_length
        for context in sorted({min(n, limit) for n in MEMORY_CONTEXTS}):
            size = footprint(recipe, shapes, context)
            cells = [f"{n / 2**20:,.0f}" for n in (size.fp16, size.fp16 // 2, size.per_sequence)]
            shared = [f"{effective_bits(recipe, shapes, context, n):.2f}" for n in SEQUENCES]
            rows.append([recipe.name, f"{context // 1024}k", *cells, f"{size.fp16 / size.per_sequence:.1f}x", *shared])
    header = ["recipe", "tokens", "bf16, MiB", "FP8, MiB", "coded, MiB", "bf16 over coded"]
    return table([*header, *(f"effective bits, {n} sequence{'s' * (n > 1)}" for n in SEQUENCES)], rows)


def load(data: dict[str, Any]) -> str:
    """The two servers at each concurrency: medians of the turns, and the coded one's over the exact one's."""
    columns = (("first_token_seconds", "first token, s", ".2f"), ("tokens_per_second", "tokens/s", ".1f"))
    header = ["sequences at a time"]
    for _, title, _ in columns:
        header += [f"{title}, coded", f"{title}, exact float32", "coded over exact"]
    rows = []
    for many in sorted({row["concurrency"] for row in data["rows"]}):
        cells = [str(many)]
        for key, _, style in columns:
            sides = [
                median(r[key] for r in data["rows"] if (r["server"], r["concurrency"]) == (side, many))
                for side in ("coded", "exact")
            ]
            cells += [*(f"{value:{style}}" for value in sides), f"{sides[0] / sides[1]:.2f}"]
        rows.append(cells)
    held = data["sequences_in_a_gigabyte"]
    note = (
        f"{data['model']}, {data['prompt_tokens']} tokens of prompt and {data['new_tokens']} new ones a sequence, "
        f"{data['threads']} threads. In 1 GB (10^9 bytes) of cache, codebooks included, lie {held['coded']:,} "
        f"sequences of {data['context']} tokens coded and {held['exact']:,} in float32: "
        f"{held['coded'] / held['exact']:.1f} times as many."
    )
    return f"{table(header, rows)}\n\n{note}"


def documents() -> dict[Path, str]:
    """Each document with its tables made anew, and the plots."""
    data = {f.stem: json.loads(f.read_text()) for f in RESULTS.glob("*.json")}
    makers = {
        "quality": ("quality_recall-28m", quality),
        "bits": ("quality_recall-28m", bits),
        "depths": ("quality_recall-28m", depths),
        "decode": ("cpu_decode", decode),
        "decode_frames": ("cpu_decode_frames", decode),
        "demo": ("demo_build", demo),
        "cuda_decode": ("cuda_attention", cuda_decode),
        "cuda_prefill": ("cuda_attention", cuda_prefill),
        "cuda_hosting": ("cuda_hosting", hosting),
        "cuda_calibration": ("cuda_calibration", calibration),
        "rivals": ("decode_rivals", rivals),
        "ort_decode": ("ort_decode", ort_decode),
        "ort_recall": ("ort_recall", ort_recall),
        "fuzz": ("fuzz", fuzzers),
        "load": ("serve_load", load),
        "gskm": ("gskm_gaussian", gskm),
        "gskm_use": ("gskm_gaussian", gskm_use),
        "tune": ("tune_demo-6m", tune),
        "ablation": ("ablation_recall-28m", ablation),
        "compare": ("compare_recall-28m", comparison),
        "compare_demo": ("compare_demo-6m", comparison),
        "rotated": ("rotated_recall-28m", partial(comparison, rivalled=False)),
        "compare_weights": ("compare_recall-28m", partial(comparison, weighted=True, rivalled=False)),
        "compare_exact": ("compare_recall-28m", partial(comparison, prefill="exact")),
        "int8_recall": ("compare_recall-28m", int8),
        "tasks": ("tasks_recall-28m", tasks),
        "int8": ("int8_demo-6m", int8),
        "large_model": ("large_model", large_model),
        "scaling": ("distributed", scaling),
    }
    counted = {"models": models, "memory": memory}  # from the recipes, nothing measured
    out = {ROOT / "docs/img" / name: text for name, text in plots(data["gskm_gaussian"]["rows"]).items()}
    out[ROOT / "docs/img/cuda_decode.svg"] = cuda_plot(data["cuda_attention"])
    if "cuda_calibration" in data:
        out[ROOT / "docs/img/cuda_calibration.svg"] = calibration_plot(data["cuda_calibration"])
    for name in (
        "deploy",
        "distributed",
        "large-models",
        "method",
        "models",
        "quality",
        "reliability",
        "speed",
        "tune",
    ):
        path = ROOT / f"docs/{name}.md"

        def replace(match: re.Match[str]) -> str:
            name = match[1]
            if name in counted:
                text = counted[name]()
            else:
                source, maker = makers[name]
                if source not in data:  # not measured yet
                    return match[0]
                text = maker(data[source])
            return f"<!-- table: {name} -->\n{text}\n<!-- end -->"

        out[path] = re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", replace, path.read_text(), flags=re.DOTALL)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = [path for path, text in documents().items() if not path.exists() or path.read_text() != text]
    if check and stale:
        sys.exit(f"not what the JSON says: {', '.join(p.name for p in stale)}; run python benchmarks/tables.py")
    for path, text in documents().items():
        path.write_text(text)


if __name__ == "__main__":
    main()
