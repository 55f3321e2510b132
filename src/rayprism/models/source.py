"""What a push is given on disk: which runtime, which file, and what goes along with it."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from rayprism.core.tensors import suggest
from rayprism.errors import LoadFailed, RepositoryError
from rayprism.models.manifest import MANIFEST_FILE, Code, RuntimeKind

__all__ = ["Source", "find_source", "git_state"]

_RUNTIME_BY_SUFFIX: dict[str, RuntimeKind] = {
    ".onnx": "onnx",
    ".pt2": "torch",
    ".pt": "torch",
    ".ts": "torch",
    ".py": "python",
}
_PICKLES = frozenset({".pkl", ".pickle", ".joblib", ".cloudpickle", ".dill", ".skops"})
_GIT_LIMIT_S = 5.0


@dataclass(frozen=True, slots=True)
class Source:
    """The files of a push, found but not yet copied.

    Args:
        runtime: What runs `file`.
        file: The model file, as it will lie in the version's folder.
        code: The class in the version's folder, if any.
        files: What to copy: the path in the version's folder to where it lies now.
    """

    runtime: RuntimeKind
    file: str
    code: Code | None
    files: dict[str, Path]

    def copy_to(self, folder: Path) -> None:
        """Copies every file; symbolic links become the files that they name."""
        for relative, path in self.files.items():
            target = folder / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def find_source(
    source: Path,
    *,
    runtime: RuntimeKind | None = None,
    file: str | None = None,
    code: str | None = None,
) -> Source:
    """Finds out what is to be pushed.

    Args:
        source: A model file, or a folder of which everything but hidden files is pushed.
        runtime: By default what the suffix says.
        file: Which file of a folder is the model.
        code: `processor.py:ClassName`: inside the folder, or beside the model file.

    Raises:
        RepositoryError: A path does not exist, or it is not clear which file is the model.
        LoadFailed: The file is of a kind that is not served, with what to do instead.
    """
    if not source.exists():
        known = [path.name for path in source.parent.iterdir()] if source.parent.is_dir() else []
        raise RepositoryError(f"{source} does not exist.{suggest(source.name, known)}")
    files = _folder_files(source) if source.is_dir() else {source.name: source}
    named = _parse_code(source, files, code) if code else None
    if source.is_dir():
        model_file = _model_file(source, files, file, named)
    else:
        model_file = source.name
        if file not in (None, model_file):
            raise RepositoryError(f"file {file!r}: {source} is a file itself, not a folder")
    kind = runtime or _runtime_of(files[model_file])
    if kind == "python" and named is None:
        named = Code(file=model_file, class_name="Model")
    if kind == "onnx":
        from rayprism.models.onnx_file import external_files

        for relative in external_files(files[model_file]):
            beside = (PurePosixPath(model_file).parent / relative).as_posix()
            files.setdefault(beside, files[model_file].parent / relative)
            if not files[beside].is_file():
                raise LoadFailed(
                    f"{source}: its weights are in {relative!r}, which is not there. Mend: put "
                    "that file beside the model, or save the model in one file"
                )
    return Source(kind, model_file, named, files)


def _folder_files(folder: Path) -> dict[str, Path]:
    files = {}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if any(part.startswith(".") or part == "__pycache__" for part in relative.parts):
            continue
        if path.is_file() and relative.as_posix() != MANIFEST_FILE:
            files[relative.as_posix()] = path
    return files


def _parse_code(source: Path, files: dict[str, Path], code: str) -> Code:
    name, _, class_name = code.rpartition(":")
    if not name.endswith(".py") or not class_name.isidentifier():
        raise RepositoryError(f"code {code!r}: allowed is FILE.py:ClassName")
    if source.is_dir():
        if name not in files:
            raise RepositoryError(
                f"code {code!r}: {source} has no such file.{suggest(name, files)}"
            )
        return Code(file=name, class_name=class_name)
    for path in (source.parent / name, Path(name)):
        if path.is_file():
            files[path.name] = path
            return Code(file=path.name, class_name=class_name)
    raise RepositoryError(f"code {code!r}: no such file beside {source}, and none at {name}")


def _model_file(source: Path, files: dict[str, Path], file: str | None, code: Code | None) -> str:
    if file is not None:
        if file not in files:
            raise RepositoryError(f"{source} has no file {file!r}.{suggest(file, files)}")
        return file
    found = [name for name in files if Path(name).suffix in (".onnx", ".pt2", ".pt", ".ts")]
    if len(found) == 1:
        return found[0]
    if found:
        raise RepositoryError(
            f"{source} holds {len(found)} model files ({', '.join(found)}): say which one is the "
            "model with file=... (on the command line: --file)"
        )
    pickles = [path for name, path in files.items() if Path(name).suffix in _PICKLES]
    if pickles:
        _runtime_of(pickles[0])
    if code is not None:
        return code.file
    if "model.py" in files:
        return "model.py"
    raise RepositoryError(
        f"{source} holds no model file (.onnx, .pt2, .pt, .ts), and no code was named"
    )


def _runtime_of(path: Path) -> RuntimeKind:
    suffix = path.suffix.lower()
    kind = _RUNTIME_BY_SUFFIX.get(suffix)
    if kind is not None:
        return kind
    if suffix in _PICKLES or _looks_pickled(path):
        raise LoadFailed(
            f"{path.name} is a pickle: loading it would run whatever it holds. Export the model "
            "instead. scikit-learn, XGBoost, LightGBM: skl2onnx.to_onnx(model, X[:1], "
            "options={'zipmap': False}); PyTorch: torch.export.save(torch.export.export(...), "
            "'model.pt2') or torch.onnx.export(...); anything else: a .py file with a class Model"
        )
    if suffix in (".h5", ".keras", ".pb", ".tflite"):
        hint = "convert it with tf2onnx to .onnx"
    elif suffix in (".safetensors", ".bin", ".pth", ".ckpt"):
        hint = "these are weights without their model: export the model to .onnx or .pt2"
    else:
        hint = "name the runtime with runtime=... (on the command line: --runtime)"
    raise LoadFailed(
        f"{path.name}: suffix {suffix or '(none)'} is not one of "
        f"{', '.join(_RUNTIME_BY_SUFFIX)}. Mend: {hint}"
    )


def _looks_pickled(path: Path) -> bool:
    with path.open("rb") as stream:
        head = stream.read(2)
    # Source: Python's pickletools: opcode PROTO (0x80) and a protocol number from 2 to 5.
    return len(head) == 2 and head[0] == 0x80 and 2 <= head[1] <= 5


def git_state(path: Path) -> dict[str, Any]:
    """Commit and cleanness of the work tree that a path lies in; empty where there is none."""
    folder = path if path.is_dir() else path.parent
    commit = _git(folder, "rev-parse", "HEAD")
    if not commit:
        return {}
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"git_commit": commit, "git_changed": bool(changed)}


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=_GIT_LIMIT_S,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
