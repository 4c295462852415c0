"""Builds the plan of an exported artifact with an installed TensorRT; refuses one built for another machine.

A plan runs with the TensorRT version and compute capability it was built with, and with the plugin and kernels it was
timed with; plan.json beside it names them.
"""

from __future__ import annotations

import ctypes
import importlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from gsrq_export import native
from gsrq_export.errors import ArtifactError, GsrqError
from gsrq_export.export.tensorrt import LIBRARIES, SETTINGS
from gsrq_export.stages.keys import file_hash

RECORD = "plan.json"
LIMIT = 1 << 16  # bytes of plan.json
CAPABILITY = (75, 76)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR


@dataclass(frozen=True)
class PlanEnvironment:
    """What a plan depends on.

    Attributes:
        tensorrt: version, "10.16.1.11".
        compute_capability: "9.0".
        plugin_sha256, kernels_sha256: of libgsrq_tensorrt*.so and libgsrq_cuda.so.
    """

    tensorrt: str
    compute_capability: str
    plugin_sha256: str
    kernels_sha256: str


_WHAT = {
    "tensorrt": "TensorRT",
    "compute_capability": "a GPU of compute capability",
    "plugin_sha256": "the plugin library with sha256",
    "kernels_sha256": "libgsrq_cuda.so with sha256",
}


def find_tensorrt() -> Any | None:
    """The module of a full TensorRT, one that builds plans; None without."""
    try:
        module = importlib.import_module("tensorrt")
    except (ImportError, OSError):
        return None
    return module if all(hasattr(module, name) for name in ("Builder", "OnnxParser", "Runtime")) else None


def environment(directory: Path, version: str, device: int = 0) -> PlanEnvironment:
    """What a plan of ``directory`` would run with here.

    Args:
        directory: that `gsrq export tensorrt` wrote.
        version: of TensorRT.
        device: the GPU's number.
    Raises:
        GsrqError: a library is missing, or there is no GPU.
    """
    plugin, kernels = libraries(directory, version)
    return PlanEnvironment(version, compute_capability(device), file_hash(plugin), file_hash(kernels))


def libraries(directory: Path, version: str) -> tuple[Path, Path]:
    """Plugin and kernels in ``directory``/lib for a version of TensorRT.

    Raises:
        GsrqError: one is missing, or that version has no plugin.
    """
    major = version.split(".", 1)[0]
    target = native.TENSORRT.get(int(major)) if major.isdigit() else None
    if target is None:
        raise GsrqError(f"TensorRT {version} has no plugin", f"use TensorRT {' or '.join(map(str, native.TENSORRT))}")
    found = directory / LIBRARIES / target.library, directory / LIBRARIES / native.CUDA.library
    for path in found:
        if not path.is_file():
            build = "gsrq plugins build --cuda --tensorrt-headers DIR"
            raise GsrqError(f"{path} is missing", f"run `{build}` and copy it there, or export again")
    return found


def compute_capability(device: int) -> str:
    """Of a GPU: "9.0".

    Raises:
        GsrqError: there is none, or no driver.
    """
    if device >= native.cuda_devices():
        raise GsrqError(f"there is no GPU {device}", "build and run plans on the GPU that serves")
    driver, numbers = ctypes.CDLL("libcuda.so.1"), []
    for attribute in CAPABILITY:
        value = ctypes.c_int(0)
        if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device) != 0:
            raise GsrqError(f"the driver does not say what GPU {device} is", "check it with nvidia-smi")
        numbers.append(value.value)
    return f"{numbers[0]}.{numbers[1]}"


def build_plan(directory: Path, trt: Any, in_place: bool = False) -> Path:
    """Build the plan of an exported artifact and its record.

    Args:
        directory: that `gsrq export tensorrt` wrote.
        trt: the module tensorrt.
        in_place: caches are updated where they lie: the caller binds past.* and present.* to one address. Triton
            does not do so.
    Returns:
        the plan's path.
    Raises:
        GsrqError: TensorRT refuses the graph or cannot build it.
    """
    settings = json.loads((directory / SETTINGS).read_text("utf-8"))
    found = environment(directory, trt.__version__)
    logger = trt.Logger(trt.Logger.WARNING)
    trt.get_plugin_registry().load_library(str(libraries(directory, trt.__version__)[0].resolve()))
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str((directory / "model.onnx").resolve())):
        errors = "\n".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise GsrqError(f"TensorRT's parser refuses model.onnx:\n{errors}", "report it with this version's number")
    config = builder.create_builder_config()
    for shapes in settings["profiles"]:
        profile = builder.create_optimization_profile()
        for name, (least, usual, most) in shapes.items():
            profile.set_shape(name, least, usual, most)
        config.add_optimization_profile(profile)
    if in_place:
        config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise GsrqError("TensorRT could not build the plan", "see what it logged above")
    path: Path = directory / ("in_place.plan" if in_place else settings["plan"])
    path.write_bytes(plan)
    record(path, found)
    return path


def record(plan: Path, built: PlanEnvironment) -> None:
    """Write plan.json beside a plan."""
    content = {"plan_sha256": file_hash(plan), **asdict(built)}
    (plan.parent / RECORD).write_text(json.dumps(content, indent=1) + "\n", "utf-8")


def check_plan(plan: Path, here: PlanEnvironment) -> None:
    """Hold a plan to its record and to what is here.

    Raises:
        ArtifactError: no record, a plan that was changed, or one built for something else; names all of it.
    """
    path = plan.parent / RECORD
    again = "build the plan here: gsrq export tensorrt --build"
    if not plan.is_file() or not path.is_file():
        raise ArtifactError(f"{plan} or the {RECORD} beside it is missing", again)
    try:
        with path.open("rb") as file:
            content = json.loads(file.read(LIMIT))
        built = PlanEnvironment(*(str(content[field.name]) for field in fields(PlanEnvironment)))
        digest = content["plan_sha256"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(f"{path} is damaged: {error!r}", again) from None
    if file_hash(plan) != digest:
        raise ArtifactError(f"{plan} is not the plan that {RECORD} describes: its sha256 differs", again)
    wrong = [
        f"it was built with {_WHAT[name]} {then}, here is {now}"
        for name, then in asdict(built).items()
        if then != (now := getattr(here, name))
    ]
    if wrong:
        raise ArtifactError(f"{plan} does not fit: " + "; ".join(wrong), again)


def load_plan(directory: Path, plan: Path, trt: Any, device: int = 0) -> tuple[Any, Any]:
    """The runtime and the engine of a plan that fits this machine; nothing is loaded of one that does not.

    Args:
        directory: that `gsrq export tensorrt` wrote; its plugin is registered.
        trt: the module tensorrt, or that of its lean runtime.
    Raises:
        ArtifactError: check_plan's, or TensorRT cannot read the plan.
    """
    check_plan(plan, environment(directory, trt.__version__, device))
    trt.get_plugin_registry().load_library(str(libraries(directory, trt.__version__)[0].resolve()))
    runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
    engine = runtime.deserialize_cuda_engine(plan.read_bytes())
    if engine is None:
        raise ArtifactError(f"TensorRT cannot read {plan}", "see what it logged above")
    return runtime, engine
