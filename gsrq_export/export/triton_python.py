"""A Triton model of the python backend for an artifact: config.pbtxt in full, and model.py, which is a line.

The model directory stands on its own: version 1 holds hard links to the artifact's files, so a copy of the directory
into any model repository serves, on a machine that has this package installed for the server's Python.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

from gsrq_export.errors import GsrqError
from gsrq_export.export.triton_files import check_library, check_name, link_files, model_files
from gsrq_export.serve.limits import Limits

MODEL_PY = '"""Served by gsrq_export, which must be installed for this server\'s Python."""\n\n' + (
    "from gsrq_export.serve.triton_model import TritonPythonModel  # noqa: F401\n"
)
# Name, type, dims; all but one kind of prompt may be left out.
INPUTS = (
    ("text_input", "TYPE_STRING", 1),
    ("messages", "TYPE_STRING", 1),
    ("input_ids", "TYPE_INT64", -1),
    ("max_tokens", "TYPE_INT32", 1),
    ("temperature", "TYPE_FP64", 1),
    ("top_k", "TYPE_INT32", 1),
    ("top_p", "TYPE_FP64", 1),
    ("seed", "TYPE_INT64", 1),
    ("stop", "TYPE_STRING", -1),
    ("stream", "TYPE_BOOL", 1),
)
OUTPUTS = (
    ("text_output", "TYPE_STRING", 1),
    ("token_ids", "TYPE_INT64", -1),
    ("finish_reason", "TYPE_STRING", 1),
    ("prompt_tokens", "TYPE_INT32", 1),
    ("completion_tokens", "TYPE_INT32", 1),
)


@dataclass(frozen=True)
class PythonSettings:
    """Of one deployment.

    Attributes:
        threads: of one operator of ONNX Runtime; 0 leaves it to that.
        op_library: "auto" takes what `gsrq plugins build` made on the server's machine, "none" runs the graph's
            function of standard operators, else the path of the custom-op library there.
        artifact: a directory to serve from; "" for the model's own version directory.
    """

    limits: Limits = field(default_factory=Limits)
    threads: int = 0
    op_library: str = "auto"
    artifact: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.threads <= 1024:
            raise GsrqError(f"threads: {self.threads} is not in 0 .. 1024", "use 0 to leave it to ONNX Runtime")
        check_library(self.op_library, "op_library")
        if self.artifact and any(c in self.artifact for c in '"\\\n'):
            raise GsrqError(f"artifact: {self.artifact!r} has quotes, backslashes or line ends", "rename the directory")


def python_config(name: str, settings: PythonSettings) -> str:
    """config.pbtxt."""
    check_name(name)
    parameters = {
        **asdict(settings.limits),
        "threads": settings.threads,
        "op_library": settings.op_library,
        "artifact": settings.artifact,
    }
    return "".join(
        (
            f'name: "{name}"\nbackend: "python"\nmax_batch_size: 0\n',
            "model_transaction_policy { decoupled: true }\n",
            _tensors("input", INPUTS, " optional: true"),
            _tensors("output", OUTPUTS),
            "instance_group [ { count: 1 kind: KIND_CPU } ]\n",
            "version_policy { specific { versions: [ 1 ] } }\n",
            *(f'parameters {{ key: "{k}" value {{ string_value: "{v}" }} }}\n' for k, v in parameters.items()),
        )
    )


def write_python_model(artifact_dir: Path, name: str, settings: PythonSettings | None = None) -> Path:
    """Write ``triton/python/<name>/`` into an artifact; its files are read-only.

    Returns:
        the model's directory.
    Raises:
        GsrqError: a bad name, or one that is there already.
        ArtifactError: a file of the artifact is missing or lies outside it.
    """
    config = python_config(name, settings or PythonSettings())
    files = model_files(artifact_dir, tokenizer=True)
    return link_files(
        artifact_dir, artifact_dir / "triton" / "python" / name, files, {"config.pbtxt": config, "1/model.py": MODEL_PY}
    )


def write_served_model(repository: Path, name: str, settings: PythonSettings) -> None:
    """A model directory in a repository that serves an artifact where it lies."""
    config = python_config(name, settings)
    (repository / name / "1").mkdir(parents=True)
    (repository / name / "config.pbtxt").write_text(config, "utf-8")
    (repository / name / "1" / "model.py").write_text(MODEL_PY, "utf-8")


def _tensors(kind: str, entries: tuple[tuple[str, str, int], ...], extra: str = "") -> str:
    rows = ",\n".join(f'  {{ name: "{n}" data_type: {t} dims: [ {d} ]{extra} }}' for n, t, d in entries)
    return f"{kind} [\n{rows}\n]\n"
