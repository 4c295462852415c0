"""Loading a transformers model from a directory, with every fault found before any long work."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from gsrq_export.errors import GsrqError, UnsupportedModelError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
    "config.json",
)


def model_directory(path: str, revision: str | None = None) -> Path:
    """The directory of a model: ``path`` itself, or the snapshot of a hub id (fetched if it is not there).

    Raises:
        GsrqError: neither a directory with a config.json nor a hub id that can be had.
    """
    directory = Path(path)
    if directory.is_dir():
        if not (directory / "config.json").is_file():
            raise GsrqError(f"model.path {path}: no config.json in it", "point it at a transformers model directory")
        return directory
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise GsrqError(f"model.path {path}: no such directory", "give a directory or a hub id such as org/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=["*.json", "*.safetensors", "*.jinja"]))
    except Exception as error:
        raise GsrqError(
            f"model.path {path}: neither a directory nor a model that could be fetched ({type(error).__name__})",
            "download the model yourself and give its directory",
        ) from error


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model, complete and readable.

    Raises:
        GsrqError: none there, one named by the index missing, or one damaged.
    """
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise GsrqError(f"{index.name} is not a weight index", "download the model again") from error
    else:
        names = ["model.safetensors"]
    files = []
    for name in names:
        file = directory / name
        if Path(name).name != name or not file.is_file():
            raise GsrqError(
                f"model weights {name} are missing in {directory}",
                "download them again; weights must be safetensors, other formats can run code",
            )
        try:
            with safe_open(file, framework="pt") as tensors:
                list(tensors.keys())
        except (SafetensorError, OSError, ValueError) as error:
            raise GsrqError(
                f"model weights {name} are damaged or truncated: {error}", "download the file again"
            ) from error
        files.append(file)
    return files


def weight_hash(directory: Path) -> str:
    """sha256 over the config and every weight file, in order of their names."""
    digest = hashlib.sha256()
    for file in [directory / "config.json", *weight_files(directory)]:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


def load_tokenizer(directory: Path, vocab_size: int) -> Any:
    """The model's tokenizer.

    Raises:
        GsrqError: it is missing, or makes ids that the model has no embedding for.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise GsrqError(
            f"no usable tokenizer in {directory}: {error}", "put the model's tokenizer files beside its config.json"
        ) from error
    check_tokenizer(tokenizer, vocab_size)
    return tokenizer


def check_tokenizer(tokenizer: Any, vocab_size: int) -> None:
    """Refuse a tokenizer that makes ids for which the model has no embedding."""
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if not 0 <= highest < vocab_size:
        raise GsrqError(
            f"the tokenizer makes ids up to {highest}, the model has {vocab_size} embeddings",
            "use the tokenizer that belongs to the model",
        )


def load_config(directory: Path) -> Any:
    """The model's configuration.

    Raises:
        GsrqError: an unknown architecture.
    """
    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise GsrqError(
            f"{directory}/config.json is not a known architecture: {error}", "see docs/models.md"
        ) from error


def load_model(directory: Path, device: torch.device | str = "cpu") -> tuple[Any, Any]:
    """A causal decoder in float32, eval mode, frozen, and its tokenizer.

    Raises:
        GsrqError: damaged or incomplete weights, an unknown architecture, a wrong tokenizer.
    """
    weight_files(directory)
    config = load_config(directory)
    tokenizer = load_tokenizer(directory, config.get_text_config().vocab_size)
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            directory,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except ValueError as error:
        raise UnsupportedModelError(f"{directory}: {error}", "use a decoder-only language model") from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    missing = sorted(info["missing_keys"])
    if missing:
        raise GsrqError(
            f"the weights lack {len(missing)} tensors of the model, the first {missing[0]}",
            "download the model again; it would run with random numbers in their place",
        )
    return model.eval().requires_grad_(False).to(device), tokenizer


def load_original(name: str, directory: Path, tokenizer: Any) -> Any:
    """The model that an artifact was built from, to be compared with it.

    Args:
        name: how the user called it, for the message.
        tokenizer: the artifact's.
    Raises:
        GsrqError: as ``load_model``, or its tokenizer is another one.
    """
    model, its_tokenizer = load_model(directory)
    if its_tokenizer.get_vocab() != tokenizer.get_vocab():
        raise GsrqError(f"--model {name}: its tokenizer is not the artifact's", "give the model it was built from")
    return model
