"""An artifact's perplexity and recall through ONNX Runtime on the CPU, and on a GPU: the two must be the same.

The same windows and cases go through both. Recall must agree case by case but for ``RECALL_CASES``: a case whose best
two tokens lie closer than float32 sums in another order may fall either way. Each window's mean likelihood must
agree within ``NLL_TOLERANCE`` nats a token. The exit status is 1 where they do not.

    python benchmarks/ort_recall.py --artifact A --text T --out cpu.json
    python benchmarks/ort_recall.py --artifact A --text T --cuda --beside cpu.json --out both.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnxruntime as ort
from environment import environment

from gsrq_export.evaluate.ort_runner import OrtRunner
from gsrq_export.evaluate.suite import EvaluationSettings, evaluate, given_tokens
from gsrq_export.runtime.generate import load_tokenizer
from gsrq_export.runtime.session import CUDA, OrtModel

NLL_TOLERANCE = 2e-3  # nats a token, of a window
RECALL_CASES = 1  # of a length that may differ
FILES = ("model.onnx", "model.onnx.data", "codebooks.safetensors")


def measure(artifact: Path, text: Path, provider: str, settings: dict[str, Any]) -> dict[str, Any]:
    """One evaluation; refuses a session that does not run the operator's library."""
    model = OrtModel(artifact, provider=provider)
    if model.backend == "onnx-function":
        raise SystemExit("the operator's library is not built: gsrq plugins build")
    chosen = EvaluationSettings(
        **settings, prompt_tokens=given_tokens(settings["window_tokens"], model.metadata.exact_prefill)
    )
    start = time.monotonic()
    metrics = evaluate(OrtRunner(model), load_tokenizer(artifact), text.read_text(encoding="utf-8"), chosen)
    return {
        "environment": environment() | {"onnxruntime": ort.__version__},
        "backend": model.backend,
        "code_order": "head" if model.metadata.codes_by_head else "token",
        "artifact": {name: hashlib.sha256((artifact / name).read_bytes()).hexdigest() for name in FILES},
        "text": hashlib.sha256(text.read_bytes()).hexdigest(),
        "settings": asdict(chosen),
        "seconds": time.monotonic() - start,
        "metrics": metrics,
    }


def compare(one: dict[str, Any], other: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What differs between two measurements, and what of it is not allowed.

    Raises:
        SystemExit: they are not of the same artifact, text and settings.
    """
    for field in ("artifact", "text", "settings"):
        if json.loads(json.dumps(one[field])) != json.loads(json.dumps(other[field])):
            raise SystemExit(f"{field} differs: {one[field]} and {other[field]}")
    first, second = one["metrics"], other["metrics"]
    pairs = zip(first["perplexity"]["window_nll"], second["perplexity"]["window_nll"], strict=True)
    differences = [abs(a - b) for a, b in pairs]
    worst = max(differences)
    refused = []
    if not all(difference <= NLL_TOLERANCE for difference in differences):  # NaN, which max may pass over, is refused
        refused.append(f"a window's likelihood differs by {worst:.2e} nats a token, allowed {NLL_TOLERANCE}")
    recall = []
    for a, b in zip(first["recall"]["lengths"], second["recall"]["lengths"], strict=True):
        differ = sum(x != y for x, y in zip(a["hits"], b["hits"], strict=True))
        recall.append({"tokens": a["tokens"], "rates": [a["rate"], b["rate"]], "cases_that_differ": differ})
        if differ > RECALL_CASES:
            refused.append(f"recall@{a['tokens']}: {differ} cases differ, allowed {RECALL_CASES}")
    found = {
        "perplexity": [first["perplexity"]["perplexity"], second["perplexity"]["perplexity"]],
        "most_nats_a_window_differs": worst,
        "nll_tolerance": NLL_TOLERANCE,
        "recall": recall,
        "recall_cases_allowed": RECALL_CASES,
        "same": not refused,
    }
    return found, refused


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cuda", action="store_true")
    parser.add_argument("--beside", type=Path, help="the JSON of the same evaluation on the CPU")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--window-tokens", type=int, default=2048)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--cases", type=int, default=24)
    parser.add_argument("--batch", type=int, default=8)
    a = parser.parse_args()
    settings = {"windows": a.windows, "window_tokens": a.window_tokens, "recall_lengths": tuple(a.lengths)}
    settings |= {"recall_cases": a.cases, "batch": a.batch}
    beside = json.loads(a.beside.read_text()) if a.beside else None
    result = measure(a.artifact, a.text, CUDA if a.cuda else "CPUExecutionProvider", settings)
    refused: list[str] = []
    if beside is not None:
        found, refused = compare(beside, result)
        result = {"comparison": found, "runs": [beside, result]}
        print(json.dumps(found, indent=1))
    else:
        metrics = result["metrics"]
        print(metrics["perplexity"]["perplexity"], [row["rate"] for row in metrics["recall"]["lengths"]])
    a.out.write_text(json.dumps(result, indent=1) + "\n")
    if refused:
        raise SystemExit("; ".join(refused))


if __name__ == "__main__":
    main()
