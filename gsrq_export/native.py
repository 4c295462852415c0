"""Builds and finds the native library: the ONNX Runtime custom op compiled from plugins/.

The library lies in a cache directory whose name holds a hash of the sources and of the compiler, so an old build is
never taken for a new one. Nothing here needs ONNX Runtime's headers.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from gsrq_export.errors import GsrqError

LIBRARY = "libgsrq_ort.so"
LIBRARY_VARIABLE = "GSRQ_ORT_LIBRARY"
CACHE_VARIABLE = "GSRQ_CACHE"
SOURCE_SUFFIXES = {".cpp", ".hpp", ".h", ".cu", ".cuh", ".txt"}
LOG_TAIL = 30  # lines of a failed build that the error shows


@dataclass(frozen=True)
class NativeLibrary:
    """What the manifest records of a library.

    Attributes:
        sha256: of the file, hexadecimal.
        instruction_sets: kernels in the library; the best that the processor has is chosen at run time.
    """

    path: Path
    sha256: str
    instruction_sets: tuple[str, ...]


def source_dir() -> Path:
    """The native sources: plugins/ of a checkout, else the copy in the installed package.

    Raises:
        GsrqError: neither is there.
    """
    package = Path(__file__).resolve().parent
    for candidate in (package.parent / "plugins", package / "_bundled" / "plugins"):
        if (candidate / "CMakeLists.txt").is_file():
            return candidate
    raise GsrqError("the native sources (plugins/CMakeLists.txt) are missing", "install gsrq-export again")


def cache_dir() -> Path:
    """Where libraries are kept: $GSRQ_CACHE/plugins, else ~/.cache/gsrq/plugins."""
    root = os.environ.get(CACHE_VARIABLE)
    return (Path(root) if root else Path.home() / ".cache" / "gsrq") / "plugins"


def build(build_dir: Path | None = None, jobs: int = 2) -> Path:
    """Compile the library and put it into the cache, replacing what is there in one step.

    Args:
        build_dir: where CMake works, kept for incremental builds; None: a temporary directory.
        jobs: compilations at a time.
    Returns:
        the library's path in the cache.
    Raises:
        GsrqError: no compiler, CMake or Ninja, or the compilation failed (with the end of its log).
    """
    if jobs < 1:
        raise GsrqError(f"jobs is {jobs}", "give 1 or more")
    compiler = _compiler()
    if compiler is None:
        raise GsrqError("no C++ compiler found ($CXX, c++, g++ or clang++)", "install g++ (9 or later) or set CXX")
    cmake, ninja = _tool("cmake", "CMAKE_BIN_DIR"), _tool("ninja", "BIN_DIR")
    target = cache_dir() / _key(compiler)
    target.mkdir(parents=True, exist_ok=True)
    with FileLock(target / ".lock"), tempfile.TemporaryDirectory(prefix="gsrq-build-") as temporary:
        work = (build_dir or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        configure = [cmake, "-S", str(source_dir()), "-B", str(work), "-G", "Ninja"]
        configure += [f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DCMAKE_CXX_COMPILER={compiler}", "-DCMAKE_BUILD_TYPE=Release"]
        _run(configure, "CMake could not configure the native library")
        _run([ninja, "-C", str(work), "-j", str(jobs), "gsrq_ort"], "the native library did not compile")
        fresh = target / f".{LIBRARY}.{os.getpid()}"
        shutil.copy2(work / LIBRARY, fresh)
        fresh.replace(target / LIBRARY)
    return target / LIBRARY


def find() -> Path | None:
    """The library to load: $GSRQ_ORT_LIBRARY, else one in the cache built from the current sources, else None.

    Raises:
        GsrqError: $GSRQ_ORT_LIBRARY names no file.
    """
    named = os.environ.get(LIBRARY_VARIABLE)
    if named:
        if not Path(named).is_file():
            raise GsrqError(f"{LIBRARY_VARIABLE} is {named}, which is no file", "unset it or name the built library")
        return Path(named)
    compiler = _compiler()
    if compiler is not None and (cache_dir() / _key(compiler) / LIBRARY).is_file():
        return cache_dir() / _key(compiler) / LIBRARY
    # Built elsewhere or with another compiler; the sources are the same.
    return next(iter(sorted(cache_dir().glob(f"{_source_hash()}-*/{LIBRARY}"))), None)


def ensure(jobs: int = 2) -> Path:
    """find(), or build() where nothing is found."""
    return find() or build(jobs=jobs)


def describe(library: Path) -> NativeLibrary:
    """What the manifest records of a library.

    Raises:
        GsrqError: the file cannot be loaded or is no GSRQ library.
    """
    try:
        sets = ctypes.CDLL(str(library.resolve())).GsrqInstructionSets
    except (OSError, AttributeError) as error:
        raise GsrqError(f"{library} is no GSRQ library: {error}", "build it again: gsrq plugins build") from error
    sets.restype = ctypes.c_char_p
    return NativeLibrary(library, hashlib.sha256(library.read_bytes()).hexdigest(), tuple(sets().decode().split(",")))


def _source_hash() -> str:
    """Of every source file's name and content; the ONNX Runtime ABI version is one of them (ort_abi.h)."""
    root, digest = source_dir(), hashlib.sha256()
    for path in sorted(p for p in root.rglob("*") if p.is_file() and p.suffix in SOURCE_SUFFIXES):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:16]


def _key(compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    build = hashlib.sha256(f"{version}\0{platform.system()}\0{platform.machine()}".encode()).hexdigest()
    return f"{_source_hash()}-{build[:8]}"


def _compiler() -> str | None:
    named = os.environ.get("CXX")
    found = [shutil.which(name) for name in ([named] if named else ["c++", "g++", "clang++"])]
    return next((path for path in found if path), None)


def _tool(name: str, variable: str) -> str:
    """The executable that the pip package brings, else the one on PATH."""
    try:
        module = __import__(name)
        bundled = shutil.which(name, path=str(getattr(module, variable)))
    except (ImportError, AttributeError):
        bundled = None
    found = bundled or shutil.which(name)
    if found is None:
        raise GsrqError(f"{name} is not installed", f"pip install {name}")
    return found


def _run(command: list[str], problem: str) -> None:
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if result.returncode != 0:
        tail = "\n".join(result.stdout.splitlines()[-LOG_TAIL:])
        raise GsrqError(
            f"{problem}; the end of the log:\n{tail}", "it needs a C++17 compiler (g++ 9, clang 10 or later)"
        )
