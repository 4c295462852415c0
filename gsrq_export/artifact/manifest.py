"""manifest.json: what an artifact holds and how it was made. Schema 1.2.

A reader accepts every minor version of its own major version and ignores keys that a newer minor added.
1.1 added cache.key_frame; artifacts of 1.0 code keys before RoPE. 1.2 added cache.code_order;
earlier ones order codes by token.
"""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gsrq_export import __version__
from gsrq_export.cache.rule import CODEBOOK_SIZE
from gsrq_export.errors import ArtifactError
from gsrq_export.stages.keys import code_hash, environment, file_hash
from gsrq_export.stages.storage import write_atomic

MANIFEST = "manifest.json"
SIGNATURE = "artifact.sig"  # of all other files; see signing.py
SCHEMA = (1, 2)
MAX_MANIFEST_BYTES = 4 << 20
OWN = (MANIFEST, SIGNATURE)  # which no manifest lists
MAX_FILES = 10_000

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]


class _Entry(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class FileEntry(_Entry):
    sha256: Sha256
    size: Count


class ModelEntry(_Entry):
    id: str
    revision: str | None = None
    weights_sha256: Sha256


class TrafficEntry(_Entry):
    sha256: Sha256
    sequences: Positive
    sequence_length: Positive


class CacheEntry(_Entry):
    """The cache rule; evaluation and serving must use the same."""

    sinks: Count
    window: Count
    block: Positive
    exact_dtype: Literal["float16", "bfloat16", "float32"]
    prefill: Literal["coded", "exact"]
    beam: Annotated[int, Field(ge=1, le=CODEBOOK_SIZE)]
    key_frame: Literal["pre-rope", "rotated"] = "pre-rope"
    code_order: Literal["token", "head"] = "token"


class SideEntry(_Entry):
    width: Positive
    stages: Positive


class LayerEntry(_Entry):
    """One layer that owns a cache; the shapes of its codebooks follow."""

    num_kv_heads: Positive
    head_dim: Positive
    keys: SideEntry
    values: SideEntry


class CodeEntry(_Entry):
    version: str
    sha256: Sha256  # of the package's Python sources


class Manifest(_Entry):
    """Attributes: files by path relative to the artifact, without the manifest itself; libraries: sha256 of
    native operator libraries by file name; environment: versions that the build ran with.
    """

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True)

    schema_version: Annotated[str, Field(alias="schema", pattern=r"^[0-9]{1,4}\.[0-9]{1,4}$")]
    created_by: str
    name: str
    model: ModelEntry
    traffic: TrafficEntry
    code: CodeEntry
    op_version: Positive
    opset: Positive
    cache: CacheEntry
    layers: Annotated[list[LayerEntry], Field(min_length=1, max_length=4096)]
    libraries: dict[str, Sha256]
    environment: dict[str, str]
    files: Annotated[dict[str, FileEntry], Field(min_length=1, max_length=MAX_FILES)]


def make_manifest(
    directory: Path,
    *,
    name: str,
    model: ModelEntry,
    traffic: TrafficEntry,
    cache: CacheEntry,
    layers: list[LayerEntry],
    op_version: int,
    opset: int,
    libraries: Mapping[str, Path] | None = None,
    device: Mapping[str, str] | None = None,
) -> Manifest:
    """Hash every file in a directory. `save_manifest` writes the result.

    Args:
        libraries: native libraries that the build used, by file name.
        device: what calculated, added to the environment.
    Raises:
        ArtifactError: the directory holds links or special files, or names that no manifest may hold.
    """
    names = list_files(directory)
    names.difference_update(OWN)
    hashed: dict[tuple[int, int], FileEntry] = {}  # by file: hard links are read once
    return Manifest(
        schema_version=f"{SCHEMA[0]}.{SCHEMA[1]}",
        created_by=f"gsrq-export {__version__}",
        name=name,
        model=model,
        traffic=traffic,
        code=CodeEntry(version=__version__, sha256=code_hash()),
        op_version=op_version,
        opset=opset,
        cache=cache,
        layers=layers,
        libraries={library: file_hash(path) for library, path in sorted((libraries or {}).items())},
        environment={**environment(), "platform": platform.system(), **(device or {})},
        files={n: _entry(directory / n, hashed) for n in sorted(names)},
    )


def save_manifest(directory: Path, manifest: Manifest) -> None:
    """Write manifest.json, which comes last: with it the directory is an artifact."""
    text = json.dumps(manifest.model_dump(mode="json", by_alias=True), indent=1) + "\n"
    write_atomic(directory / MANIFEST, lambda path: path.write_text(text, encoding="utf-8"))


def with_file(manifest: Manifest, directory: Path, name: str) -> Manifest:
    """The manifest with a file that was added to the directory since."""
    files = {**manifest.files, name: _entry(directory / name, {})}
    return manifest.model_copy(update={"files": dict(sorted(files.items()))})


def load_manifest(directory: Path) -> Manifest:
    """Read and check manifest.json; nothing else of the artifact is touched.

    Raises:
        ArtifactError: absent, too large, not JSON, of another major version, fields missing or wrong, or a file
            name that leaves the directory.
    """
    path = directory / MANIFEST
    if not directory.is_dir():
        raise ArtifactError(f"{directory} is not a directory", "name the directory that a build wrote")
    if path.is_symlink() or not path.is_file():
        raise ArtifactError(f"{directory} has no {MANIFEST}", "name the directory that a build wrote")
    with path.open("rb") as file:
        content = file.read(MAX_MANIFEST_BYTES + 1)
    if len(content) > MAX_MANIFEST_BYTES:
        raise ArtifactError(f"{path} is over {MAX_MANIFEST_BYTES >> 20} MiB", "it is no manifest; build again")
    try:
        data = json.loads(content.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is not JSON: {error}", "the file is damaged; build again") from None
    newer = _check_schema(path, data)
    try:
        manifest = Manifest.model_validate(data, extra="ignore" if newer else "forbid")
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_url=False)[:5]]
        raise ArtifactError(
            f"{path} has {error.error_count()} wrong fields:\n  " + "\n  ".join(faults), "build again"
        ) from None
    for name in manifest.files:
        check_name(name)
    return manifest


def check_name(name: str) -> None:
    """Refuse names of files that could reach outside an artifact, or mean different files on different systems.

    Raises:
        ArtifactError: absolute, '..', backslash, drive, control character, half of a
            surrogate pair, not in its plain form, the manifest or the
            signature.
    """
    if not isinstance(name, str):  # a string of a damaged ONNX file
        raise ArtifactError(f"file name {name!r} is not UTF-8", "do not use this artifact")
    pure = PurePosixPath(name)
    plain = str(pure) == name and ".." not in pure.parts and not pure.is_absolute() and name not in ("", ".")
    if (
        not plain
        or any(c in "\\:" or ord(c) < 32 or 0xD800 <= ord(c) < 0xE000 for c in name)
        or len(name) > 1024
        or name in OWN
    ):
        raise ArtifactError(f"file name {name!r} is not a plain path inside the artifact", "do not use this artifact")


def list_files(directory: Path) -> set[str]:
    """Relative POSIX paths of all files below a directory, hard links included.

    Raises:
        ArtifactError: symbolic links, sockets or devices, names of `check_name`'s, or too many files.
    """
    names: set[str] = set()
    pending = [directory]
    while pending:
        for path in pending.pop().iterdir():
            name = path.relative_to(directory).as_posix()
            if path.is_symlink():
                raise ArtifactError(f"{name} is a symbolic link", "an artifact holds plain files; build again")
            if path.is_dir():
                pending.append(path)
            elif path.is_file():
                if name not in OWN:
                    check_name(name)
                names.add(name)
            else:
                raise ArtifactError(f"{name} is neither a file nor a directory", "an artifact holds plain files")
            if len(names) > MAX_FILES + len(OWN):
                raise ArtifactError(f"{directory} holds over {MAX_FILES} files", "it is no artifact")
    return names


def _entry(path: Path, hashed: dict[tuple[int, int], FileEntry]) -> FileEntry:
    stat = path.stat()
    key = stat.st_dev, stat.st_ino
    if key not in hashed:
        hashed[key] = FileEntry(sha256=file_hash(path), size=stat.st_size)
    return hashed[key]


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def _check_schema(path: Path, data: Any) -> bool:
    """Whether the minor version is newer than ours."""
    version = data.get("schema") if isinstance(data, dict) else None
    if not isinstance(version, str) or not re.fullmatch(r"[0-9]{1,4}\.[0-9]{1,4}", version):
        raise ArtifactError(f"{path}: schema {version!r} is no version", "it is not an artifact's manifest")
    major, minor = (int(part) for part in version.split("."))
    if major != SCHEMA[0]:
        mend = "install a newer gsrq-export" if major > SCHEMA[0] else "build the artifact again from its recipe"
        raise ArtifactError(f"{path}: schema {version}, this version reads {SCHEMA[0]}.x", mend)
    return minor > SCHEMA[1]
