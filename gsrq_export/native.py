"""Builds and finds the native libraries compiled from plugins/: the ONNX Runtime custom op and the CUDA kernels.

A library lies in a cache directory whose name holds a hash of its sources and of the compilers, so an old build is
never taken for a new one. Nothing here needs ONNX Runtime's headers.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from gsrq_export.errors import GsrqError

CACHE_VARIABLE = "GSRQ_CACHE"
SOURCE_SUFFIXES = {".cpp", ".hpp", ".h", ".cu", ".cuh", ".map", ".txt"}
LOG_TAIL = 30  # lines of a failed build that the error shows


@dataclass(frozen=True)
class Target:
    """A library that plugins/ makes.

    Attributes:
        library: its file name.
        variable: the environment variable that names one to use instead.
        cmake: its CMake target.
        sets: its exported function that names the instruction sets or compute capabilities it has kernels for.
        others: folders of plugins/ it is not made from; changes there leave it valid.
        cuda: nvcc compiles it.
    """

    library: str
    variable: str
    cmake: str
    sets: str
    others: frozenset[str]
    cuda: bool = False


ORT = Target("libgsrq_ort.so", "GSRQ_ORT_LIBRARY", "gsrq_ort", "GsrqInstructionSets", frozenset({"cuda", "tensorrt"}))
CUDA = Target(
    "libgsrq_cuda.so",
    "GSRQ_CUDA_LIBRARY",
    "gsrq_cuda_shared",
    "gsrq_cuda_architectures",
    frozenset({"cpu", "ort", "tensorrt"}),
    cuda=True,
)
# The ONNX Runtime op for the CPU and for CUDA.
ORT_CUDA = Target(
    "libgsrq_ort_cuda.so",
    "GSRQ_ORT_CUDA_LIBRARY",
    "gsrq_ort_cuda",
    "GsrqCudaArchitectures",
    frozenset({"tensorrt"}),
    cuda=True,
)
# The TensorRT plugin, one a major version of TensorRT; it loads the library of CUDA kernels.
TENSORRT = {
    major: Target(
        f"libgsrq_tensorrt{major}.so",
        f"GSRQ_TENSORRT{major}_LIBRARY",
        "gsrq_tensorrt",
        "GsrqTensorRTVersion",
        frozenset({"ort"}),
        cuda=True,
    )
    for major in (10, 11)
}


@dataclass(frozen=True)
class NativeLibrary:
    """What the manifest records of a library.

    Attributes:
        sha256: of the file, hexadecimal.
        instruction_sets: kernels in the library; the best that the processor has is chosen at run time. Of a CUDA
            library the compute capabilities, "90" for 9.0; of a TensorRT plugin the version of its headers.
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


def build(
    build_dir: Path | None = None,
    jobs: int = 2,
    target: Target = ORT,
    architectures: tuple[str, ...] = (),
    tensorrt_headers: Path | None = None,
) -> Path:
    """Compile a library and put it into the cache, replacing what is there in one step.

    Args:
        build_dir: where CMake works, kept for incremental builds; None: a temporary directory.
        jobs: compilations at a time.
        architectures: of a CUDA library, compute capabilities as "90"; none: those that CMakeLists.txt names.
        tensorrt_headers: for a TensorRT plugin, the folder of NvInfer.h of that major version.
    Returns:
        the library's path in the cache.
    Raises:
        GsrqError: no compiler, CMake or Ninja, or the compilation failed (with the end of its log).
    """
    if jobs < 1:
        raise GsrqError(f"jobs is {jobs}", "give 1 or more")
    bad = [name for name in architectures if not re.fullmatch(r"\d{2,3}[af]?", name)]
    if bad or (architectures and not target.cuda):
        raise GsrqError(f"architectures: {bad or architectures}", 'name compute capabilities as "90", for CUDA only')
    compiler = _compiler()
    if compiler is None:
        raise GsrqError("no C++ compiler found ($CXX, c++, g++ or clang++)", "install g++ (9 or later) or set CXX")
    if target.cuda and nvcc() is None:
        raise GsrqError("no CUDA compiler found ($CUDACXX, nvcc)", "install the CUDA toolkit (12 or later)")
    if (tensorrt_headers is not None) != (target in TENSORRT.values()):
        raise GsrqError(f"{target.library} with TensorRT headers {tensorrt_headers}", "give them for a TensorRT plugin")
    if tensorrt_headers is not None and target is not tensorrt_target(tensorrt_headers):
        raise GsrqError(
            f"{target.library} is not for the TensorRT of {tensorrt_headers}", "give that version's headers"
        )
    cmake, ninja = _tool("cmake", "CMAKE_BIN_DIR"), _tool("ninja", "BIN_DIR")
    kept = cache_dir() / _key(compiler, target)
    if architectures:
        kept = kept.with_name(f"{kept.name}-{'.'.join(architectures)}")
    kept.mkdir(parents=True, exist_ok=True)
    with FileLock(kept / ".lock"), tempfile.TemporaryDirectory(prefix="gsrq-build-") as temporary:
        work = (build_dir or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        configure = [cmake, "-S", str(source_dir()), "-B", str(work), "-G", "Ninja"]
        configure += [f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DCMAKE_CXX_COMPILER={compiler}", "-DCMAKE_BUILD_TYPE=Release"]
        headers = tensorrt_headers.resolve() if tensorrt_headers else ""
        configure += [f"-DGSRQ_TENSORRT_HEADERS={headers}"]
        if target.cuda:
            configure += ["-DGSRQ_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc()}"]
            chosen = "-DGSRQ_CUDA_ARCHITECTURES=" + ";".join(architectures)
            configure += [chosen if architectures else "-UGSRQ_CUDA_ARCHITECTURES"]
        _run(configure, "CMake could not configure the native library")
        _run([ninja, "-C", str(work), "-j", str(jobs), target.cmake], "the native library did not compile")
        fresh = kept / f".{target.library}.{os.getpid()}"
        shutil.copy2(work / target.library, fresh)
        fresh.replace(kept / target.library)
    return kept / target.library


def find(target: Target = ORT) -> Path | None:
    """The library to load: the one its variable names, else one in the cache built from the current sources, else None.

    Raises:
        GsrqError: the variable (GSRQ_ORT_LIBRARY for the op on the CPU) names no file.
    """
    named = os.environ.get(target.variable)
    if named:
        if not Path(named).is_file():
            raise GsrqError(f"{target.variable} is {named}, which is no file", "unset it or name the built library")
        return Path(named)
    compiler = _compiler()
    if compiler is not None:
        exact = cache_dir() / _key(compiler, target) / target.library
        if exact.is_file():
            return exact
    # Built elsewhere, with another compiler or for chosen architectures; the sources are the same.
    return next(iter(sorted(cache_dir().glob(f"{_source_hash(target)}-*/{target.library}"))), None)


def ensure(jobs: int = 2, target: Target = ORT) -> Path:
    """find(), or build() where nothing is found."""
    return find(target) or build(jobs=jobs, target=target)


def describe(library: Path, target: Target = ORT) -> NativeLibrary:
    """What the manifest records of a library.

    Raises:
        GsrqError: the file cannot be loaded or is no GSRQ library.
    """
    try:
        sets = getattr(ctypes.CDLL(str(library.resolve())), target.sets)
    except (OSError, AttributeError) as error:
        again = "gsrq plugins build" + (" --cuda" if target.cuda else "")
        raise GsrqError(f"{library} is no GSRQ library: {error}", f"build it again: {again}") from error
    sets.restype = ctypes.c_char_p
    return NativeLibrary(library, hashlib.sha256(library.read_bytes()).hexdigest(), tuple(sets().decode().split(",")))


def tensorrt_target(headers: Path) -> Target:
    """The plugin that these headers of TensorRT are for.

    Raises:
        GsrqError: no headers, or of a version that the plugin is not written for.
    """
    file = headers / "NvInferVersion.h"
    mend = "name the include/ folder of TensorRT 10.3 or later (github.com/NVIDIA/TensorRT has it)"
    if not file.is_file():
        raise GsrqError(f"{headers} has no NvInferVersion.h", mend)
    text = file.read_text("utf-8", "replace")
    found = [
        re.search(rf"define (?:TRT|NV_TENSORRT)_{part}(?:_ENTERPRISE)? (\d+)", text) for part in ("MAJOR", "MINOR")
    ]
    version = tuple(int(number.group(1)) for number in found if number)
    if len(version) != 2 or version < (10, 3) or version[0] not in TENSORRT:
        raise GsrqError(f"{headers} is of TensorRT {'.'.join(map(str, version)) or 'of unknown version'}", mend)
    return TENSORRT[version[0]]


def nvcc() -> str | None:
    """The CUDA compiler: $CUDACXX, else nvcc on PATH, else the toolkit's usual place."""
    named = os.environ.get("CUDACXX")
    found = [shutil.which(name) for name in ([named] if named else ["nvcc", "/usr/local/cuda/bin/nvcc"])]
    return next((path for path in found if path), None)


def cuda_devices() -> int:
    """GPUs that the driver shows this process; 0 without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def _source_hash(target: Target) -> str:
    """Of every source file's name and content; the ONNX Runtime ABI version is one of them (ort_abi.h)."""
    root, digest = source_dir(), hashlib.sha256()
    for path in sorted(p for p in root.rglob("*") if p.is_file() and p.suffix in SOURCE_SUFFIXES):
        name, content = path.relative_to(root), path.read_bytes()
        if not target.others & set(name.parts):
            digest.update(f"{name.as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:16]


def _key(compiler: str, target: Target = ORT) -> str:
    compilers = [compiler] + ([path] if target.cuda and (path := nvcc()) else [])
    versions = [subprocess.run([c, "--version"], capture_output=True, text=True, check=False).stdout for c in compilers]
    build = hashlib.sha256("\0".join([*versions, platform.system(), platform.machine()]).encode()).hexdigest()
    return f"{_source_hash(target)}-{build[:8]}"


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
