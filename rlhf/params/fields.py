"""What every section of the params is made of: bounded numbers, and the closed section itself."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Share = Annotated[float, Field(ge=0, le=1)]
PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
LearningRate = Annotated[float, Field(gt=0, le=1)]
Temperature = Annotated[float, Field(gt=0, le=10)]
Key = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
"""A policy's name: it becomes a folder, a DVC stage and an MLflow run."""


class Section(BaseModel):
    """A closed, frozen part of `params.yaml`: an unknown key is an error, no value has a default."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
