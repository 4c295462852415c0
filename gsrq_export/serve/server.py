"""Finds a tritonserver, gives it the Python environment of this program, and runs it."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gsrq_export.errors import GsrqError
from gsrq_export.export.triton_python import PythonSettings, write_served_model

OVERLAY = "triton-numpy"  # of .ci/setup, in the virtual environment
EXIT_SECONDS = 10
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Server:
    """An installed tritonserver.

    Attributes:
        binary: the program.
        backends: the folder of backends; None for the program's own default.
        libraries: put first on LD_LIBRARY_PATH.
        stub: of the python backend, where the backends folder lacks it.
        paths: put first on the path of the server's Python.
    """

    binary: Path
    backends: Path | None = None
    libraries: tuple[Path, ...] = ()
    stub: Path | None = None
    paths: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Addresses:
    host: str = "127.0.0.1"
    http: int = 8000
    grpc: int = 8001
    metrics: int = 8002


def find_server(binary: Path | None = None, paths: Sequence[Path] = ()) -> Server:
    """The tritonserver named, else the one on PATH or where NVIDIA's containers have it, else nvidia-pytriton's.

    Raises:
        GsrqError: none.
    """
    for path in paths:
        if not path.is_dir():
            raise GsrqError(f"--server-path: {path} is not a directory", "name one that holds Python packages")
    if binary is not None:
        if not os.access(binary, os.X_OK) or not binary.is_file():
            raise GsrqError(f"--tritonserver: {binary} is not a program", "name the tritonserver program")
        return Server(binary.absolute(), paths=tuple(paths))
    found = shutil.which("tritonserver", path=f"{os.environ.get('PATH', '')}:/opt/tritonserver/bin")
    if found:
        return Server(Path(found), paths=tuple(paths))
    spec = importlib.util.find_spec("pytriton")
    if spec is None or not spec.submodule_search_locations:
        raise GsrqError(
            "no tritonserver on PATH or in /opt/tritonserver/bin, and nvidia-pytriton is not installed",
            "name it with --tritonserver, or: pip install --no-deps nvidia-pytriton==0.7.0",
        )
    package = Path(next(iter(spec.submodule_search_locations)))
    root = package / "tritonserver"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = root / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.is_file():
        raise GsrqError(f"nvidia-pytriton has no python backend for Python {version}", "use another Python")
    libraries = [package.parent / "nvidia_pytriton.libs", Path(sysconfig.get_config_var("LIBDIR"))]
    overlay = Path(sys.prefix) / OVERLAY
    own = (overlay,) if overlay.is_dir() else ()
    return Server(root / "bin" / "tritonserver", root / "backends", tuple(libraries), stub, (*map(Path, paths), *own))


def prepare(
    server: Server, folder: Path, name: str, settings: PythonSettings, at: Addresses
) -> tuple[list[str], dict[str, str]]:
    """Write the model repository and the server's Python environment into a folder.

    The python backend's Python takes its environment from the ``python3`` that stands first on PATH; so a virtual
    environment is laid there that leads to the packages of this very process.

    Returns:
        the command line, and its environment.
    """
    write_served_model(folder / "repository", name, settings)
    return command(server, folder, folder / "repository", at)


def command(server: Server, folder: Path, repository: Path, at: Addresses) -> tuple[list[str], dict[str, str]]:
    """As `prepare`, for a repository that is there already."""
    environment = _environment(server, folder / "python")
    arguments = [
        str(server.binary),
        f"--model-repository={repository}",
        f"--http-address={at.host}",
        f"--grpc-address={at.host}",
        f"--metrics-address={at.host}",
        f"--http-port={at.http}",
        f"--grpc-port={at.grpc}",
        f"--metrics-port={at.metrics}",
        "--allow-gpu-metrics=false",
        "--disable-auto-complete-config",
        "--strict-readiness=true",
        f"--exit-timeout-secs={EXIT_SECONDS}",
    ]
    backends = server.backends
    if server.stub is not None and backends is not None:
        place = folder / "backends" / "python"
        place.mkdir(parents=True)
        for file in (*(backends / "python").iterdir(), server.stub):
            if file.is_file():
                (place / file.name).symlink_to(file)
        backends = folder / "backends"
    if backends is not None:
        arguments.append(f"--backend-directory={backends}")
    return arguments, environment


def _environment(server: Server, folder: Path) -> dict[str, str]:
    site = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    site.mkdir(parents=True)
    (folder / "bin").mkdir()
    base = Path(sys.base_prefix, "bin")
    (folder / "bin" / "python3").symlink_to(Path(sys._base_executable).resolve())  # type: ignore[attr-defined]
    (folder / "pyvenv.cfg").write_text(f"home = {base}\ninclude-system-site-packages = false\n")
    package = Path(__file__).resolve().parents[2]
    standard = sysconfig.get_paths()["stdlib"]
    packages = [p for p in sys.path if p.endswith(("site-packages", "dist-packages")) and not p.startswith(standard)]
    packages += [p for p in sys.path if p.startswith(standard) and p.endswith("site-packages")]
    (site / "gsrq.pth").write_text("".join(f"{p}\n" for p in (*server.paths, package, *packages)))
    environment = dict(os.environ)
    environment.pop("PYTHONPATH", None)  # the stub's Python would read it before the folders above
    environment["PATH"] = f"{folder / 'bin'}:{environment.get('PATH', '')}"
    if server.libraries:
        old = environment.get("LD_LIBRARY_PATH")
        environment["LD_LIBRARY_PATH"] = ":".join([*map(str, server.libraries), *([old] if old else [])])
    return environment


class Running:
    """A started server; ends with this process, or with ``stop``."""

    def __init__(self, arguments: Sequence[str], environment: dict[str, str], at: Addresses, name: str) -> None:
        self.at, self.name = at, name
        libc = ctypes.CDLL(None) if sys.platform.startswith("linux") else None

        def follow() -> None:  # a server must not outlive the program that started it, however that ends
            if libc is not None:
                libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

        try:
            self.process = subprocess.Popen(arguments, env=environment, preexec_fn=follow, start_new_session=True)
        except OSError as error:
            raise GsrqError(f"{arguments[0]} does not start: {error.strerror}", "check --tritonserver") from error

    def wait_ready(self, seconds: float) -> None:
        """Until the model answers.

        Raises:
            GsrqError: the server ended, or the time is up; its log has the reason.
        """
        until = time.monotonic() + seconds
        address = f"http://{self.at.host}:{self.at.http}/v2/models/{self.name}/ready"
        while time.monotonic() < until:
            if self.process.poll() is not None:
                raise GsrqError(f"tritonserver ended with status {self.process.returncode}", "its log says why")
            with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=5) as answer:
                if answer.status == 200:
                    return
            time.sleep(0.1)
        self.stop()
        raise GsrqError(
            f"tritonserver was not ready in {seconds:.0f} s", "its log says why; --start-seconds gives more"
        )

    def stop(self) -> None:
        """End it: first politely."""
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(EXIT_SECONDS + 5)
        with contextlib.suppress(ProcessLookupError):  # it, and a stub that it has left
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
