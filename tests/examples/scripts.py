"""Running the examples' scripts, and importing what is in them."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def run_script(path: str, *arguments: object, ok: bool = True) -> str:
    """Runs a script of the examples as its reader would, from the root of the repository.

    Returns:
        What it printed; with `ok=False` what it said on stderr when it failed.
    """
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / path), *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert (done.returncode == 0) is ok, f"{path} gave {done.returncode}:\n{done.stderr}"
    return done.stdout if ok else done.stderr


def import_script(path: str) -> ModuleType:
    """Imports a script under a name of its own: three examples have a `client.py`."""
    file = EXAMPLES / path
    name = "examples_" + path.removesuffix(".py").replace("/", "_")
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(file.parent))  # as `python file.py` does
    # Dataclasses look their module up.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(file.parent))
    return module
