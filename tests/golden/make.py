"""Makes the golden artifact of the schema that this version writes, once, when a schema version is released.

    python tests/golden/make.py

writes tests/golden/<schema>/artifact and expected.json (token ids and the logits after them). Never remake an old one:
the point is that new code reads what old code wrote.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE.parent)]

import numpy as np  # noqa: E402
import yaml  # noqa: E402
from families import tiny_model  # noqa: E402
from traffic.byte_tokenizer import byte_tokenizer  # noqa: E402

from gsrq_export.artifact.manifest import SCHEMA  # noqa: E402
from gsrq_export.commands.app import cli  # noqa: E402
from gsrq_export.runtime.session import OrtModel  # noqa: E402

SOURCE = Path("/tmp/gsrq-golden")  # the artifact names the model's path
TOKENS = [72, 101, 108, 108, 111, 44, 32, 119, 111, 114, 108, 100, 33, 32, 49, 50, 51, 52, 53, 54]
RECIPE = {
    "name": "golden",
    "model": {"path": str(SOURCE / "model")},
    "traffic": {"sources": [{"kind": "self"}], "sequences": 6, "sequence_length": 48},
    "codec": {"keys": {"width": 4, "stages": 2}, "values": {"width": 8, "stages": 1}, "iterations": 2},
    "cache": {"sinks": 1, "window": 3, "block": 8, "exact_dtype": "float32", "code_order": "head"},
    "export": {"max_length": 48},
    "evaluate": {"perplexity": {"sequences": 1, "length": 48}},
}


def main() -> None:
    out = HERE / f"{SCHEMA[0]}.{SCHEMA[1]}"
    if out.exists():
        sys.exit(f"{out} is there; golden artifacts are not remade")
    shutil.rmtree(SOURCE, ignore_errors=True)
    model = tiny_model(
        "Llama",
        **{"vocab_size": 257, "num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "head_dim": 8},
        **{"num_attention_heads": 2, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 0},
    )
    model.save_pretrained(SOURCE / "model")
    byte_tokenizer().save_pretrained(SOURCE / "model")
    (SOURCE / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    built = SOURCE / "artifact"
    cli.main(["build", "--recipe", str(SOURCE / "recipe.yaml"), "--out", str(built)], standalone_mode=False)
    out.mkdir()
    shutil.copytree(built, out / "artifact")
    logits = last_logits(OrtModel(built, library=None), TOKENS)
    (out / "expected.json").write_text(json.dumps({"tokens": TOKENS, "logits": [round(float(x), 5) for x in logits]}))
    shutil.rmtree(SOURCE)


def last_logits(model: OrtModel, tokens: list[int]) -> np.ndarray:
    """Prefill of all but the last six tokens, then those one at a time; [vocabulary] after the last."""
    logits = model.prefill([tokens[:-6]])
    for token in tokens[-6:]:
        logits = model.step([token])
    return logits[0]


if __name__ == "__main__":
    main()
