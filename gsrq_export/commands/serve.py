"""gsrq serve: a tritonserver with an artifact, in one command."""

from __future__ import annotations

import importlib.util
import signal
import tempfile
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import click

from gsrq_export.commands.options import artifact_option, threads_option
from gsrq_export.errors import ArtifactError, GsrqError
from gsrq_export.serve.limits import Limits

if TYPE_CHECKING:
    from gsrq_export.serve.server import Addresses, Running

_PORT = click.IntRange(1, 65535)


@click.command()
@artifact_option
@click.option("--name", help="Of the model on the server; default: the directory's.")
@click.option("--tritonserver", type=click.Path(path_type=Path), help="The program; default: PATH, nvidia-pytriton.")
@click.option(
    "--server-path",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Python packages that the server's Python finds first; may be repeated.",
)
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--http-port", type=_PORT, default=8000, show_default=True)
@click.option("--grpc-port", type=_PORT, default=8001, show_default=True)
@click.option("--metrics-port", type=_PORT, default=8002, show_default=True)
@click.option("--openai", is_flag=True, help="Also answer the OpenAI API, /v1/completions and the like.")
@click.option("--openai-port", type=_PORT, default=9000, show_default=True)
@click.option("--max-sequences", type=int, default=32, show_default=True, help="Sequences in the cache at once.")
@click.option("--max-queue", type=int, default=256, show_default=True, help="Requests that may wait.")
@click.option("--max-new-tokens", type=int, default=4096, show_default=True, help="Of one request.")
@click.option("--max-prompt-tokens", type=int, default=0, help="Default: what the artifact allows.")
@click.option("--cache-pages", type=int, default=0, help="Pages of coded tokens that all share; default: no limit.")
@click.option("--op-library", default="auto", show_default=True, help="auto, none, or the custom-op library's path.")
@click.option("--key", type=click.Path(path_type=Path), help="Serve only what is signed with this public key (PEM).")
@click.option("--start-seconds", type=click.IntRange(1), default=120, show_default=True)
@threads_option
def serve(
    artifact: Path,
    name: str | None,
    tritonserver: Path | None,
    server_path: tuple[Path, ...],
    host: str,
    http_port: int,
    grpc_port: int,
    metrics_port: int,
    openai: bool,
    openai_port: int,
    max_sequences: int,
    max_queue: int,
    max_new_tokens: int,
    max_prompt_tokens: int,
    cache_pages: int,
    op_library: str,
    key: Path | None,
    start_seconds: int,
    threads: int | None,
) -> None:
    """Serve an artifact with Triton Inference Server (python backend) until interrupted."""
    from gsrq_export.export.triton_python import PythonSettings
    from gsrq_export.serve.server import Addresses, Running, find_server, prepare

    if openai and (importlib.util.find_spec("uvicorn") is None or importlib.util.find_spec("tritonclient") is None):
        raise GsrqError("--openai: starlette, uvicorn and tritonclient are not installed", "install the extra: serve")
    if not (artifact / "model.onnx").is_file():
        raise ArtifactError(f"{artifact / 'model.onnx'} does not exist", "name the directory that a build wrote")
    if key is not None:
        from gsrq_export.artifact.signing import require_signature

        require_signature(artifact, key)
    limits = Limits(max_sequences, max_queue, max_new_tokens, min(128, max_new_tokens), max_prompt_tokens, cache_pages)
    settings = PythonSettings(limits, threads or 0, op_library, str(artifact.absolute()))
    server, at = find_server(tritonserver, server_path), Addresses(host, http_port, grpc_port, metrics_port)
    name = name or artifact.absolute().name.replace(".", "_")

    def leave(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, leave)
    with tempfile.TemporaryDirectory(prefix="gsrq-serve-") as folder:
        running = Running(*prepare(server, Path(folder), name, settings, at), at, name)
        try:
            running.wait_ready(start_seconds)
            click.echo(f"{name}: http {host}:{http_port}, grpc {host}:{grpc_port}, metrics {host}:{metrics_port}")
            if openai:
                _front(running, at, name, openai_port)
            raise SystemExit(running.process.wait())
        except KeyboardInterrupt:
            click.echo("stopping", err=True)
        finally:
            running.stop()


def _front(running: Running, at: Addresses, name: str, port: int) -> None:
    """Answer the OpenAI API in this process until interrupted or the server ends."""
    import threading

    import uvicorn

    from gsrq_export.serve.openai_front import Front

    config = uvicorn.Config(
        Front(at, name).app, at.host, port, log_level="warning", timeout_graceful_shutdown=5, limit_concurrency=1024
    )
    front = uvicorn.Server(config)

    def watch() -> None:
        running.process.wait()
        front.should_exit = True

    threading.Thread(target=watch, daemon=True).start()
    click.echo(f"OpenAI API: http://{at.host}:{port}/v1")
    front.run()
    if running.process.poll() is None:  # the front was interrupted, so all is to end
        raise KeyboardInterrupt
