"""What every table of a recipe is made of: frozen, strict, closed; and the kinds of number it holds."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _whole(value: Any) -> Any:
    """TOML writes 1e9 as a float: a whole one is a count."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Count = Annotated[int, BeforeValidator(_whole), Field(gt=0)]
Whole = Annotated[int, BeforeValidator(_whole), Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """One table of a recipe: frozen, strict (a quoted number is an error), closed (an unknown key is an error)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
