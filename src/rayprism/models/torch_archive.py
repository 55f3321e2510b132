"""Whether a torch file can be loaded without running code that is hidden in it.

What was found in torch 2.13, by reading its loaders and by making archives that attack them:

- `torch.load` of a saved module or state dict unpickles: never served.
- `torch.jit.load` (TorchScript) runs an unpickler of its own and then a program in its own
  language, which can write files; torch's documentation says to load only what is trusted.
- `torch.export.load` (.pt2) keeps plain weights as raw bytes, and yet runs code of the archive's
  choosing in these places: weights and constants marked `use_pickle` (`weights_only=False`),
  opaque constants (`pickle.loads`), sample inputs that fail `weights_only=True` (it tries again
  without), compiled libraries under `data/aotinductor`, shape expressions (`sympy.sympify`, which
  evaluates them as Python), tree specs (`import_module`), names in the graph (written into Python
  source and executed) and guards (the same).

So a .pt2 archive is read here first, through torch's own reader and with nothing evaluated. One
that holds only plain parts loads without permission: raw tensors, sample inputs that pass
`weights_only=True`, identifiers for names, arithmetic for shapes, and ATen operators that touch no
files. For anything else, and for TorchScript, the operator has to allow code. Guards are never
compiled, see `rayprism.models.torch`.
"""

from __future__ import annotations

import ast
import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from rayprism.errors import LoadFailed

__all__ = ["archive_kind", "find_risks"]

_PLAIN_RECORDS = re.compile(
    r"archive_format|archive_version|byteorder|version|\.data/\w+|\.format_version"
    r"|\.storage_alignment|models/model\.json|data/sample_inputs/model\.pt"
    r"|data/weights/(weight_\d+|model_weights_config\.json)"
    r"|data/constants/(tensor_\d+|model_constants_config\.json)|extra/.*",
    re.DOTALL,
)
_CONFIGS = re.compile(r"data/(weights|constants)/model_\w+_config\.json")
_PAYLOAD = re.compile(r"(weight|tensor)_\d+")
# Names and versions. Without brackets, quotes and white space they cannot call anything.
_PLAIN_STRING = re.compile(r"[A-Za-z0-9_.+-]{0,1024}")
_PLAIN_OPERATOR = re.compile(
    r"torch\.ops\.(aten|prims|quantized_decomposed)\.(?!from_file\b|save\b|load\b)\w+(\.\w+)?"
    r"|torch\.ops\.higher_order\.(cond|wrap_with_set_grad_enabled|wrap_with_autocast)"
    r"|_operator\.(add|sub|mul|floordiv|truediv|mod|pow|neg|pos|eq|ne|lt|le|gt|ge|and_|or_|not_"
    r"|getitem)|math\.(ceil|floor|trunc|sqrt)|torch\.sym_[a-z]+"
)
_FUNCTIONS = frozenset((
    "Symbol", "Integer", "Float", "Rational", "Add", "Mul", "Pow", "Max", "Min", "Mod", "Abs",
    "floor", "ceiling", "Eq", "Ne", "Lt", "Le", "Gt", "Ge", "And", "Or", "Not", "FloorDiv",
    "ModularIndexing", "Where", "PythonMod", "CleanDiv", "CeilToInt", "FloorToInt", "CeilDiv",
    "LShift", "RShift", "PowByNatural", "FloatPow", "FloatTrueDiv", "IntTrueDiv",
    "TruncToFloat", "TruncToInt", "RoundToInt", "RoundDecimal", "ToFloat", "Identity",
    "Equality", "Unequality", "StrictLessThan", "LessThan", "StrictGreaterThan", "GreaterThan",
))  # fmt: skip
_ARITHMETIC = (
    ast.Expression, ast.Call, ast.keyword, ast.Name, ast.Load, ast.Constant, ast.BinOp, ast.UnaryOp,
    ast.Compare, ast.BoolOp, ast.operator, ast.unaryop, ast.cmpop, ast.boolop,
)  # fmt: skip
_SYMBOL = re.compile(r"[a-z]{1,8}\d+")
_TREES = frozenset(
    {"builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict", None}
)
_SHOWN = 4


def archive_kind(path: Path) -> Literal["export", "script"]:
    """What a torch file is.

    Raises:
        LoadFailed: It is a pickle, an archive of a torch before 2.9, or none of torch's.
    """
    hint = (
        "Export the model: torch.export.save(torch.export.export(model.eval(), (example,), "
        "dynamic_shapes=...), 'model.pt2')"
    )
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.partition("/")[2] for name in archive.namelist()]
            top = archive.namelist()
    except (OSError, zipfile.BadZipFile) as error:
        raise LoadFailed(
            f"{path.name} is no torch archive ({error}): it was cut short, or is a pickle of an "
            f"old torch, which would run whatever it holds. {hint}"
        ) from None
    if "archive_format" in names:
        return "export"
    if "constants.pkl" in names and any(name.startswith("code/") for name in names):
        return "script"
    if "serialized_exported_program.json" in top:
        raise LoadFailed(f"{path.name} was exported by a torch before 2.9. {hint}")
    raise LoadFailed(
        f"{path.name} was written by torch.save: a pickled module or its weights. Loading it "
        f"would run whatever it holds. {hint}"
    )


def find_risks(path: Path) -> list[str]:
    """The parts of a .pt2 archive that are not known to be plain; empty where it is safe to load.

    Raises:
        LoadFailed: It cannot be read.
    """
    # torch's own reader: another one could be shown other records by a crafted file.
    from torch.export.pt2_archive import PT2ArchiveReader

    try:
        with PT2ArchiveReader(str(path)) as archive:
            risks = list(_risks(archive))
    except (RuntimeError, ValueError, KeyError, TypeError, RecursionError) as error:
        first = str(error).partition("\n")[0]
        raise LoadFailed(f"{path.name}: torch cannot read the archive: {first}") from error
    shown = risks[:_SHOWN]
    return shown if len(risks) <= _SHOWN else [*shown, f"and {len(risks) - _SHOWN} more"]


def _risks(archive: Any) -> Iterator[str]:
    names = archive.get_file_names()
    strange = [name for name in names if not _PLAIN_RECORDS.fullmatch(name)]
    if len(set(names)) != len(names):
        strange.append("records of the same name")
    yield from (f"it holds {name!r:.80}" for name in strange)
    for name in names:
        if _CONFIGS.fullmatch(name):
            yield from _payload_risks(name, json.loads(archive.read_string(name)))
        elif name.startswith("models/"):
            yield from _graph_risks(json.loads(archive.read_string(name)), "")
        elif name.startswith("data/sample_inputs/") and not _is_weights_only(
            archive.read_bytes(name)
        ):
            yield "its sample inputs are pickled objects"


def _is_weights_only(payload: bytes) -> bool:
    import torch

    if not payload:
        return True
    try:
        torch.load(io.BytesIO(payload), weights_only=True)
    except Exception:
        return False
    return True


def _payload_risks(name: str, config: Any) -> Iterator[str]:
    for tensor, entry in config["config"].items():
        if entry.get("use_pickle") is not False or not _PAYLOAD.fullmatch(entry["path_name"]):
            yield f"{name}: {tensor!r:.80} is pickled"


def _graph_risks(value: Any, key: str) -> Iterator[str]:
    """Walks the graph's JSON; every string has to be of the kind that its key may hold."""
    if isinstance(value, dict):
        for inner, item in value.items():
            if not _PLAIN_STRING.fullmatch(inner):
                yield f"the graph has the key {inner!r:.80}"
            if not _is_text(inner, item):
                yield from _graph_risks(item, inner)
    elif isinstance(value, list):
        for item in value:
            yield from _graph_risks(item, key)
    elif isinstance(value, str) and not _is_plain(value, key):
        yield f"the graph has {key} {value!r:.80}"


def _is_text(key: str, value: Any) -> bool:
    """Whether this is text that is kept for people, or guards, neither of which is evaluated.

    Told by the form as well as by the key: the keys of some objects are names of the archive's
    choosing, and what is under those has to be looked at.
    """
    if key == "metadata" and isinstance(value, dict):
        return all(isinstance(item, str) for item in value.values())
    if key == "guards_code" and isinstance(value, list):
        return all(isinstance(item, str) for item in value)
    return False


def _is_plain(value: str, key: str) -> bool:
    if key == "as_string":
        # An argument of an operator, as in einsum("bij,bjk->bik"): written into source by repr().
        return True
    if key == "expr_str":
        return _is_arithmetic(value)
    if key in ("in_spec", "out_spec"):
        return _is_plain_tree(value)
    if key in ("target", "as_operator"):
        return bool(_PLAIN_OPERATOR.fullmatch(value))
    return bool(_PLAIN_STRING.fullmatch(value))


def _is_arithmetic(expression: str) -> bool:
    try:
        tree = ast.parse(expression, mode="eval")
    except (SyntaxError, ValueError, MemoryError):
        return False
    for node in ast.walk(tree):
        if not isinstance(node, _ARITHMETIC):
            return False
        if isinstance(node, ast.Call) and not isinstance(node.func, ast.Name):
            return False
        if isinstance(node, ast.Name) and not (
            node.id in _FUNCTIONS or _SYMBOL.fullmatch(node.id) or node.id in ("oo", "int_oo")
        ):
            return False
        if isinstance(node, ast.Constant) and not (
            isinstance(node.value, bool | int | float)
            or (isinstance(node.value, str) and _SYMBOL.fullmatch(node.value))
        ):
            return False
    return True


def _is_plain_tree(text: str) -> bool:
    if not text:
        return True
    version, root = json.loads(text)
    pending = [root]
    while pending:
        node = pending.pop()
        # A context with an object in it may name a class to import.
        context = json.loads(node["context"] or "null")
        keys = context if isinstance(context, list) else []
        if (
            node["type"] not in _TREES
            or not (context is None or isinstance(context, list))
            or not all(isinstance(key, str) and _PLAIN_STRING.fullmatch(key) for key in keys)
        ):
            return False
        pending.extend(node["children_spec"])
    return bool(version == 1)
