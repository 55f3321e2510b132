"""How operators write a model and its version, the same in every file that names one."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from rayprism.models.manifest import is_model_name

__all__ = ["DATA_VARIABLE", "REPOSITORY_VARIABLE", "ModelName", "VersionNumber"]

REPOSITORY_VARIABLE = "RAYPRISM_REPOSITORY"
"""Environment variable that names the model repository where a file does not."""

DATA_VARIABLE = "RAYPRISM_DATA"
"""Environment variable that names the folder where relative paths of batch jobs start."""


def _is_name(value: str) -> str:
    if not is_model_name(value):
        raise ValueError(
            "a model name has letters, digits, '.', '_' and '-', at most 128, "
            "starting with a letter or digit, no '..'"
        )
    return value


def _version_from_digits(value: Any) -> Any:
    if isinstance(value, (bool, float)):
        raise ValueError('a whole number from 1, as in "3"')
    # People write both 3 and "3", and mean the same.
    return int(value) if isinstance(value, str) and value.isascii() and value.isdigit() else value


ModelName = Annotated[str, AfterValidator(_is_name)]
VersionNumber = Annotated[int, Field(ge=1), BeforeValidator(_version_from_digits)]
