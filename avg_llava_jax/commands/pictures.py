"""The flag of commands that read images: how large an image may be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from absl import flags

if TYPE_CHECKING:
    from avg_llava_jax.data.images import ImageRef

MAX_PIXELS = flags.DEFINE_integer(
    "max_pixels",
    89_478_485,
    "Largest width x height of an image; Pillow reads no more than twice the default.",
    lower_bound=1,
    upper_bound=178_956_970,
)


def refs(paths: Sequence[str]) -> list[ImageRef]:
    """References to image files of at most --max_pixels."""
    from avg_llava_jax.data.images import image_ref

    return [image_ref(path, MAX_PIXELS.value) for path in paths]
