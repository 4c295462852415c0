"""A runner as lm-eval's language model. Imports lm-eval: see harness.py for who may."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from gsrq_export.errors import GsrqError
from gsrq_export.evaluate.runner import Runner, token_nll

Request = tuple[list[int], list[int]]  # context, continuation


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """Scoring and generation, both through the runner's cache.

    With exact prefill a call's own tokens are exact. So that a continuation of one token is scored from the
    coded cache too, the context's last token is then decoded, not prefilled.

    Args:
        eos: token ids that end a text, besides the tokenizer's.
        exact_prefill: of the runner's cache rule.
        max_length: tokens of a request at most, prompt and answer together; None: what the runner takes.
        batch: requests at once.
    Raises:
        GsrqError: no token that starts or ends a text is known.

    Attributes:
        truncated: requests so far that lost the start of their context.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Any,
        eos: frozenset[int],
        exact_prefill: bool,
        max_length: int | None = None,
        batch: int = 8,
    ) -> None:
        super().__init__()
        self._runner, self.tokenizer, self._batch = runner, tokenizer, batch
        self._exact_prefill = exact_prefill
        self._max_length = min(max_length or runner.max_length, runner.max_length)
        end = tokenizer.eos_token_id
        self._eos = eos if end is None else eos | {end}
        start = tokenizer.bos_token_id
        if start is None and not self._eos:
            raise GsrqError("the tokenizer has neither a start nor an end token", "lm-eval scores nothing without one")
        self._start = start if start is not None else min(self._eos)
        self.truncated = 0

    @property
    def eot_token_id(self) -> int:
        return min(self._eos) if self._eos else self._start

    @property
    def prefix_token_id(self) -> int:
        return self._start

    @property
    def max_length(self) -> int:
        return self._max_length

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        if add_special_tokens is None:  # a chat template has put its start token already
            bos = self.tokenizer.bos_token
            add_special_tokens = bos is None or not string.startswith(bos)
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=add_special_tokens, verbose=False)
        return ids

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        fitted = [self._fit(context, continuation) for _, context, continuation in requests]
        # Requests of one shape share a batch: no padding, which would take the places of sink tokens.
        by_shape: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index, (context, continuation) in enumerate(fitted):
            by_shape[len(context), len(continuation)].append(index)
        scores: list[tuple[float, bool]] = [(0.0, True)] * len(fitted)
        for (start, _), indices in by_shape.items():
            for at in range(0, len(indices), self._batch):
                part = indices[at : at + self._batch]
                ids = torch.tensor([[*fitted[i][0], *fitted[i][1]] for i in part])
                for i, score in zip(part, self._score(ids, start), strict=True):
                    scores[i] = score
        return scores

    def _score(self, ids: torch.Tensor, start: int) -> list[tuple[float, bool]]:
        """Sum of log-probabilities of tokens start .., and whether each is the most likely one."""
        at = max(1, start - 1) if self._exact_prefill else start
        total = torch.zeros(len(ids), dtype=torch.float64)
        greedy = torch.ones(len(ids), dtype=torch.bool)
        for chunk in self._runner.logits(ids, at):
            stop = at + chunk.shape[1]
            skip = max(0, start - at)
            if skip < chunk.shape[1]:
                targets = ids[:, at + skip : stop].to(chunk.device)
                logits = chunk[:, skip:]
                total -= token_nll(logits, targets).double().sum(1).cpu()
                greedy &= (logits.argmax(-1) == targets).all(1).cpu()
            at = stop
        return list(zip(total.tolist(), greedy.tolist(), strict=True))

    def _fit(self, context: list[int], continuation: list[int]) -> Request:
        room = self.max_length - len(continuation)
        if room < 1 or not continuation:
            raise GsrqError(
                f"lm-eval: a continuation of {len(continuation)} tokens cannot be scored with {self.max_length}",
                "leave this task out, or build with a larger export.max_length",
            )
        self.truncated += len(context) > room
        return context[-room:], continuation

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        found = []
        for request in requests:
            windows: Iterator[Request] = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length - 1, context_len=1
            )
            pairs = [("", *make_disjoint_window(window)) for window in windows]
            found.append(sum(score for score, _ in self._loglikelihood_tokens(pairs)))
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        prompts: list[list[int]] = []
        groups: dict[tuple[int, tuple[str, ...]], list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            text, given = request.args
            asked = normalize_gen_kwargs(given)
            if asked.get("do_sample"):
                raise GsrqError(
                    "lm-eval: the task samples (do_sample: true), this evaluation decodes greedily",
                    "set do_sample: false in the task's generation_kwargs",
                )
            most = int(asked["max_gen_toks"])
            room = self.max_length - most
            if room < 1:
                raise GsrqError(
                    f"lm-eval: the task asks for {most} new tokens, the model has {self.max_length} in all",
                    "lower max_gen_toks in the task's generation_kwargs, or build with a larger export.max_length",
                )
            prompt = self.tok_encode(text) or [self.prefix_token_id]
            self.truncated += len(prompt) > room
            prompts.append(prompt[-room:])
            groups[most, tuple(stop for stop in asked["until"] if stop)].append(index)
        texts = [""] * len(prompts)
        for (most, stops), indices in groups.items():
            indices.sort(key=lambda i: len(prompts[i]))  # rows of a batch end at about the same time
            for at in range(0, len(indices), self._batch):
                part = indices[at : at + self._batch]
                for i, text in zip(part, self._generate([prompts[i] for i in part], most, stops), strict=True):
                    texts[i] = text
        return texts

    def _generate(self, prompts: list[list[int]], most: int, stops: tuple[str, ...]) -> list[str]:
        def ended(tokens: list[int]) -> bool:
            return tokens[-1] in self._eos or any(stop in self._decode(tokens) for stop in stops)

        answers = self._runner.greedy(prompts, most, ended)
        return [postprocess_generated_text(self._decode(answer), list(stops), None) for answer in answers]

    def _decode(self, tokens: list[int]) -> str:
        kept = tokens[:-1] if tokens and tokens[-1] in self._eos else tokens
        text: str = self.tokenizer.decode(kept, skip_special_tokens=True)
        return text

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text
