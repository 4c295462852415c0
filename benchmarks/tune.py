"""Does a tuned budget recall at least as much as the uniform one of equal bytes? From what `gsrq tune` left behind.

    python benchmarks/tune.py recipe.yaml --work tuned.yaml.work --bits 1 --bits 0.5 --context 2048 --sequences 64 \
        --out benchmarks/results/tune.json

The recipe's cache rule and the search's own quickly trained codebooks serve all budgets. A case counts as recalled
where every answer token is the likeliest one after the exact tokens before it: when greedy decoding gives the answer.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environment import environment

from gsrq_export.baselines.residual import ResidualCodec
from gsrq_export.build.package import budgets
from gsrq_export.build.source import Source
from gsrq_export.build.stages import held_out_text
from gsrq_export.capture import KINDS, attend
from gsrq_export.codec.finetune import CodedModel
from gsrq_export.evaluate.perplexity import pick_windows
from gsrq_export.evaluate.recall import make_cases
from gsrq_export.evaluate.stats import bootstrap_mean, wilson
from gsrq_export.model.intercept import intercept
from gsrq_export.recipe import Recipe, SelfSource, load_recipe
from gsrq_export.tune.budget import best_uniform
from gsrq_export.tune.measure import Meter
from gsrq_export.tune.search import TUNED, UNIFORM, Search
from gsrq_export.tune.settings import EFFORTS
from gsrq_export.tune.stages import Ladders, measures_in, read_book, read_traffic, split
from gsrq_export.tune.target import make_target

WINDOW = 512  # tokens of a perplexity window


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--bits", type=float, action="append", required=True)
    parser.add_argument("--context", type=int, required=True)
    parser.add_argument("--sequences", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cases", type=int, default=48)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=12)
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe)
    source, layers = Source(recipe), Source(recipe).shapes()
    work = {path.name.split("-")[0]: path for path in arguments.work.glob("*-*") if path.suffix != ".partial"}
    ladders: Ladders = measures_in(work["sensitivity"])
    books = {ladder: read_book(work["ladders"], *ladder) for ladder in ladders}
    ids, answers = read_traffic(work["traffic"], source.tokenizer)
    rows = split(answers, EFFORTS["quick"]).compared
    int8 = recipe.codec.codewords == "int8"
    meter = Meter(source.model, source.spec, ids[rows], answers[rows], recipe.codec.beam, int8)

    text = held_out_text(SelfSource(kind="self", seed=77), source, WINDOW * arguments.windows + arguments.length)
    tokens = source.tokenizer.encode(text, add_special_tokens=False, verbose=False)
    windows = pick_windows(tokens, WINDOW, arguments.windows)
    cases = make_cases(tokens, source.tokenizer, arguments.length, arguments.cases, 5)
    found: list[dict[str, Any]] = [{"budget": "exact", **measure(source, None, windows, cases)}]
    print(found[-1], flush=True)
    for bits in arguments.bits:
        target = make_target(recipe, layers, arguments.context, arguments.sequences, bits)
        search = Search(recipe, layers, target, books, ladders, meter)
        where = (target.context, target.sequences, target.bytes)
        blind = {
            ladder: {stages: replace(found, answer_kl=None) for stages, found in rungs.items()}
            for ladder, rungs in ladders.items()
        }
        tried = [
            (UNIFORM[True], best_uniform(recipe, layers, True, *where)),
            (TUNED, search.allocated(target.bytes, recipe.cache)),
            ("tuned without answers", replace(search, ladders=blind).allocated(target.bytes, recipe.cache)),
        ]
        for name, budget in tried:
            if budget is None:
                continue
            candidate = search.candidate(name, budget, recipe.cache)
            entry = {
                "budget": candidate.name,
                "target_bits": bits,
                "effective_bits": candidate.size.effective_bits,
                **{f"{kind}s": budgets(candidate.recipe, kind, len(layers)) for kind in KINDS},
                "kl": asdict(candidate.measured),
                "kl_added_up": asdict(candidate.summed),
            }
            print(entry, flush=True)
            found.append(entry | measure(source, student(source, candidate.recipe, books), windows, cases))
            print(found[-1]["perplexity"], found[-1]["recall"], flush=True)
            result = {"context": target.context, "sequences": target.sequences, "found": found}
            arguments.out.write_text(json.dumps({**result, "environment": environment()}, indent=1) + "\n")


def student(source: Source, recipe: Recipe, books: dict[tuple[int, str, int], Any]) -> CodedModel:
    """The model with every layer coded as the recipe has it."""
    coders = []
    for layer in range(len(source.spec.layers)):
        sides = {kind: recipe.codec.side(kind, layer) for kind in KINDS}
        keys, values = (
            ResidualCodec(books[layer, kind, side.width].first_stages(side.stages), recipe.codec.beam).reconstruct_heads
            for kind, side in sides.items()
        )
        coders.append((keys, values))
    return CodedModel(source.spec, coders, recipe.cache.rule)


@torch.no_grad()
def measure(source: Source, coded: CodedModel | None, windows: torch.Tensor, cases: list[Any]) -> dict[str, Any]:
    """Perplexity and recall with their 95 % intervals."""
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
    return {
        "perplexity": math.exp(float(np.mean(nll))),
        "perplexity_interval": [math.exp(end) for end in bootstrap_mean(np.array(nll), 0)],
        "recall": sum(hits) / len(hits),
        "recall_interval": list(wilson(sum(hits), len(hits))),
        "cases": len(hits),
    }


if __name__ == "__main__":
    main()
