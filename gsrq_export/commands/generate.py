"""gsrq generate: text from an artifact, streamed."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click

from gsrq_export.commands.options import artifact_option, backend_option, open_model, threads_option
from gsrq_export.errors import GsrqError
from gsrq_export.runtime.generate import Generation, Sampling, load_eos, load_tokenizer


@click.command()
@artifact_option
@click.option("--prompt", help="Text to go on from; - or nothing reads standard input.")
@click.option("--chat", is_flag=True, help="Put the prompt through the model's chat template.")
@click.option("--max-new-tokens", type=int, default=128, show_default=True)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0: greedy.")
@click.option("--top-k", type=int, default=0, show_default=True, help="0: all tokens.")
@click.option("--top-p", type=float, default=1.0, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@threads_option
@backend_option
def generate(
    artifact: Path,
    prompt: str | None,
    chat: bool,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    threads: int | None,
    backend: str,
) -> None:
    """Generate text with the coded cache; text goes to standard output, figures to standard error."""
    sampling = Sampling(temperature, top_k, top_p, seed)
    text = sys.stdin.read() if prompt in (None, "-") else prompt
    assert text is not None
    tokenizer = load_tokenizer(artifact)
    ids: str | list[int] = text
    if chat:
        if not tokenizer.chat_template:
            raise GsrqError("--chat: the artifact's tokenizer has no chat template", "leave out --chat")
        messages = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    model = open_model(artifact, threads, backend)
    run = Generation(model, tokenizer, ids, max_new_tokens=max_new_tokens, sampling=sampling, eos=load_eos(artifact))
    start = time.perf_counter()
    for piece in run:
        click.echo(piece, nl=False)
    click.echo()
    seconds = time.perf_counter() - start
    tokens = int(model.lengths.sum())
    click.echo(
        f"[{len(run.prompt_tokens)} prompt + {len(run.new_tokens)} new tokens in {seconds:.2f} s, "
        f"stopped by {run.stop}, {model.backend}, cache {model.cache_bytes / max(tokens, 1):.0f} bytes a token]",
        err=True,
    )
