"""The model of Triton's python backend: requests of the server become the engine's, its events the answers.

Inputs and outputs are those of export/triton_python.py. Every request is answered in pieces as the text grows (or once,
with ``stream`` false), and ends with Triton's final flag. A client that went away is noticed by the engine's polling.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gsrq_export.errors import GsrqError
from gsrq_export.runtime.generate import Sampling, load_eos, load_tokenizer
from gsrq_export.runtime.session import OrtModel
from gsrq_export.serve.engine import Engine
from gsrq_export.serve.limits import Limits, QueueFullError
from gsrq_export.serve.metrics import MEASURES
from gsrq_export.serve.request import Event, Request
from gsrq_export.serve.slots import SlotCache

LIMITS = ("max_sequences", "max_queue", "max_new_tokens", "default_new_tokens", "max_prompt_tokens", "cache_pages")
MAX_MESSAGES_BYTES = 16 << 20


def read_request(tensors: dict[str, Any], tokenizer: Any) -> tuple[Request, bool]:
    """The engine's request, and whether it is to be streamed.

    Args:
        tensors: the inputs that came, as numpy arrays by name.
    Raises:
        GsrqError: not exactly one kind of prompt, or a value that cannot be.
    """
    given = [name for name in ("text_input", "messages", "input_ids") if name in tensors]
    if len(given) != 1:
        raise GsrqError(
            f"prompt: {' and '.join(given) or 'nothing'} given", "give one of text_input, messages, input_ids"
        )

    def one(name: str, default: Any) -> Any:
        if name not in tensors:
            return default
        if tensors[name].size != 1:
            raise GsrqError(f"{name}: {tensors[name].size} values", "give one")
        return tensors[name].reshape(-1)[0].item() if tensors[name].dtype != object else tensors[name].reshape(-1)[0]

    prompt: str | list[int]
    if given == ["input_ids"]:
        prompt = [int(i) for i in tensors["input_ids"].reshape(-1)]
    else:
        prompt = _text(one(given[0], b""), given[0])
        if given == ["messages"]:
            prompt = chat_prompt(prompt, tokenizer)
    most = one("max_tokens", None)
    sampling = Sampling(
        float(one("temperature", 0.0)), int(one("top_k", 0)), float(one("top_p", 1.0)), int(one("seed", 0))
    )
    stop = tuple(_text(s, "stop") for s in tensors["stop"].reshape(-1)) if "stop" in tensors else ()
    return Request(prompt, None if most is None else int(most), sampling, stop), bool(one("stream", True))


def chat_prompt(text: str, tokenizer: Any) -> list[int]:
    """Token ids of a chat, through the model's own template.

    Args:
        text: JSON, [{"role": ..., "content": ...}, ...].
    Raises:
        GsrqError: no chat template, or not such a list.
    """
    if not tokenizer.chat_template:
        raise GsrqError("messages: the artifact's tokenizer has no chat template", "use a plain prompt")
    if len(text) > MAX_MESSAGES_BYTES:
        raise GsrqError(f"messages: {len(text)} characters", f"send at most {MAX_MESSAGES_BYTES}")
    try:
        messages = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise GsrqError(f"messages: not JSON: {error}", 'send [{"role": "user", "content": "..."}]') from None
    sound = isinstance(messages, list) and all(
        isinstance(m, dict) and set(m) == {"role", "content"} and all(isinstance(v, str) for v in m.values())
        for m in messages
    )
    if not sound or not messages:
        raise GsrqError("messages: not a list of role and content", 'send [{"role": "user", "content": "..."}]')
    try:
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    except Exception as error:  # a template raises what it likes, for roles out of order for instance
        raise GsrqError(f"messages: the chat template refuses them: {error}", "correct roles and order") from None
    return [int(i) for i in ids]


def _text(value: Any, name: str) -> str:
    try:
        return value.decode() if isinstance(value, bytes) else str(value)
    except UnicodeDecodeError:
        raise GsrqError(f"{name}: it is not UTF-8", "send UTF-8 text") from None


class TritonPythonModel:
    """What model.py hands to Triton."""

    @staticmethod
    def load(
        artifact: Path, threads: int | None, library: Path | Literal["auto"] | None, slots: int
    ) -> tuple[OrtModel, SlotCache]:
        """The model and the cache of all its sequences; benchmarks/exact_serving.py puts others here."""
        model = OrtModel(artifact, threads, library)
        return model, SlotCache(model, slots)

    def initialize(self, args: dict[str, str]) -> None:
        import triton_python_backend_utils as pb

        self._pb = pb
        _check_numpy(pb)
        config = json.loads(args["model_config"])
        settings = {name: entry["string_value"] for name, entry in config.get("parameters", {}).items()}
        own = Path(args["model_repository"]) / args["model_version"]
        artifact = Path(settings["artifact"]) if settings.get("artifact") else own
        library = settings.get("op_library", "auto")
        try:
            limits = Limits(**{name: int(settings[name]) for name in LIMITS if name in settings})
            chosen: Path | Literal["auto"] | None
            chosen = "auto" if library == "auto" else None if library == "none" else Path(library)
            model, cache = self.load(artifact, int(settings.get("threads", "0")) or None, chosen, limits.max_sequences)
            self._tokenizer = load_tokenizer(artifact)
            self._families = {
                name: pb.MetricFamily(name=name, description=of.help, kind=getattr(pb.MetricFamily, of.kind.upper()))
                for name, of in MEASURES.items()
            }
            labels = {"model": args["model_name"], "version": args["model_version"]}
            self._metrics = {name: family.Metric(labels=labels) for name, family in self._families.items()}
            self._reported = dict.fromkeys(MEASURES, 0.0)
            self._engine = Engine(model, self._tokenizer, load_eos(artifact), limits, self._report, cache)
        except (GsrqError, ValueError) as error:
            raise pb.TritonModelException(str(error)) from error

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            sender = request.get_response_sender()
            try:
                tensors = {t.name(): t.as_numpy() for t in request.inputs()}
                wanted, stream = read_request(tensors, self._tokenizer)
                self._engine.submit(wanted, self._listener(sender, stream), sender.is_cancelled)
            except QueueFullError as error:
                self._refuse(sender, str(error), self._pb.TritonError.UNAVAILABLE)
            except GsrqError as error:
                self._refuse(sender, str(error), self._pb.TritonError.INVALID_ARG)
            except Exception as error:  # one odd request must not end the process and all the others
                self._refuse(sender, f"{type(error).__name__}: {error}", self._pb.TritonError.INTERNAL)

    def finalize(self) -> None:
        self._engine.close()

    def _listener(self, sender: Any, stream: bool) -> Callable[[Event], None]:
        pb = self._pb
        texts: list[str] = []
        ids: list[int] = []

        def listen(event: Event) -> None:
            last = event.finish is not None
            texts.append(event.text)
            ids.extend(event.tokens)
            if event.finish == "error":
                self._refuse(sender, event.error, pb.TritonError.INTERNAL)
            elif event.finish == "cancelled":
                self._refuse(sender, "cancelled", pb.TritonError.CANCELLED)
            elif last or stream:
                values = {
                    "text_output": np.array(["".join(texts).encode()], object),
                    "token_ids": np.array(ids, np.int64),
                    "finish_reason": np.array([(event.finish or "").encode()], object),
                    "prompt_tokens": np.array([event.prompt_tokens], np.int32),
                    "completion_tokens": np.array([event.new_tokens], np.int32),
                }
                texts.clear()
                ids.clear()
                response = pb.InferenceResponse([pb.Tensor(name, value) for name, value in values.items()])
                sender.send(response, flags=pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL if last else 0)

        return listen

    def _refuse(self, sender: Any, message: str, code: Any) -> None:
        response = self._pb.InferenceResponse(error=self._pb.TritonError(message, code))
        sender.send(response, flags=self._pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _report(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            if value == self._reported[name]:
                continue
            if MEASURES[name].kind == "gauge":
                self._metrics[name].set(value)
            else:
                self._metrics[name].increment(value - self._reported[name])
            self._reported[name] = value


def _check_numpy(pb: Any) -> None:
    """Older servers' python backends misread numpy 2 arrays: say so instead of ending at the first request."""
    try:
        # From another tensor the backend makes an array as it does from a request's; a tensor of an array keeps that.
        made = pb.Tensor.from_dlpack("copy", pb.Tensor("probe", np.array([1, 2, 3], np.int64)))
        sound = made.as_numpy().tolist() == [1, 2, 3]
    except Exception:
        sound = False
    if not sound:
        raise pb.TritonModelException(
            f"this server's python backend cannot read arrays of numpy {np.__version__}; put numpy 1.26 first on its "
            "path: pip install --no-deps --target DIR numpy==1.26.4, then gsrq serve --server-path DIR"
        )
