"""A record of a benchmark, independent of its layout."""

from __future__ import annotations

import dataclasses
from typing import Any

from avg_llava_jax.data.images import ImageRef


@dataclasses.dataclass(frozen=True)
class Row:
    """`where` names a record's file and its number there; `images` has None where a field is empty."""

    where: str
    fields: dict[str, Any]
    images: dict[str, ImageRef | None]
