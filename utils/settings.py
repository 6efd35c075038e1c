"""Settings of a room, as the options of the same names say them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any


class FromOptions:
    """For dataclasses whose fields are names of options."""

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Any:
        """Options that are none of the fields play no part."""
        return cls(**{field.name: options[field.name] for field in fields(cls) if field.name in options})
