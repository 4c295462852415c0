"""Does a tuned budget recall at least as much as the uniform one of equal bytes? From what `gsrq tune` left behind.

    python benchmarks/tune.py tuned.json --work tuned.yaml.work --out benchmarks/results/tune.json

Both budgets use the search's own quickly trained codebooks. A case counts as recalled where every answer token is the
likeliest one given the exact tokens before it, which is when greedy decoding gives the whole answer.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environment import environment

from gsrq_export.build.source import Source
from gsrq_export.build.stages import held_out_text
from gsrq_export.capture import attend
from gsrq_export.codec.finetune import CodedModel
from gsrq_export.evaluate.perplexity import pick_windows
from gsrq_export.evaluate.recall import make_cases
from gsrq_export.evaluate.stats import bootstrap_mean, wilson
from gsrq_export.model.intercept import intercept
from gsrq_export.recipe import Recipe, SelfSource
from gsrq_export.tune.ladder import prefix
from gsrq_export.tune.measure import Decoded
from gsrq_export.tune.stages import read_book


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tuned", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cases", type=int, default=48)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=12)
    arguments = parser.parse_args()
    data = json.loads(arguments.tuned.read_text())
    recipe = Recipe.model_validate(data["recipe"])
    source = Source(recipe)
    ladders = max(arguments.work.glob("ladders-*"), key=lambda path: path.stat().st_mtime)
    text = held_out_text(SelfSource(kind="self", seed=77), source, 512 * arguments.windows + arguments.length)
    tokenizer = source.tokenizer
    ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    windows = pick_windows(ids, 512, arguments.windows)
    cases = make_cases(ids, tokenizer, arguments.length, arguments.cases, 5)
    coded = {f"{c['name']}, window {c['window']}": c for c in (*data["uniform"], *data["tuned"][:1], data["best"])}
    found: dict[str, Any] = {"exact": measure(source, None, windows, cases)}
    print("exact", found["exact"])
    for name, candidate in coded.items():
        students = student(source, candidate, ladders)
        found[name] = {"effective_bits": candidate["effective_bits"], "kl": candidate["measured"]}
        found[name] |= measure(source, students, windows, cases)
        print(name, found[name], flush=True)
    result = {"target": data["target"], "found": found, "environment": environment()}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


def student(source: Source, candidate: dict[str, Any], ladders: Path) -> CodedModel:
    own = {entry["layer"]: entry for entry in candidate["layers"]}
    coders = []
    for i in range(len(source.spec.layers)):
        pair = []
        for kind in ("key", "value"):
            side = own.get(i, candidate)[f"{kind}s"]
            book = prefix(read_book(ladders, i, kind, side["width"]), side["stages"])
            pair.append(Decoded(book, source.recipe.codec.beam))
        coders.append((pair[0], pair[1]))
    update = {"sinks": candidate["sinks"], "window": candidate["window"]}
    return CodedModel(source.spec, coders, source.recipe.cache.model_copy(update=update).rule)


@torch.no_grad()
def measure(source: Source, coded: CodedModel | None, windows: torch.Tensor, cases: list[Any]) -> dict[str, Any]:
    model, spec = source.model, source.spec
    nll, hits = [], []
    with intercept(model, coded or (lambda call: attend(call, spec))):
        for row in windows:
            logits = model(input_ids=row[None], use_cache=False).logits[0, :-1]
            nll.append(float(torch.nn.functional.cross_entropy(logits, row[1:])))
        for case in cases:
            whole = torch.from_numpy(np.concatenate([case.prompt, case.answer]))
            likeliest = model(input_ids=whole[None], use_cache=False).logits[0, len(case.prompt) - 1 : -1].argmax(-1)
            hits.append(bool((likeliest == whole[len(case.prompt) :]).all()))
    low, high = bootstrap_mean(np.array(nll), 0)
    return {
        "perplexity": math.exp(float(np.mean(nll))),
        "perplexity_interval": [math.exp(low), math.exp(high)],
        "recall": sum(hits) / len(hits),
        "recall_interval": list(wilson(sum(hits), len(hits))),
        "cases": len(hits),
    }


if __name__ == "__main__":
    main()
