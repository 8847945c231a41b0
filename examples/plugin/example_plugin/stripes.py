"""A trigger of vertical stripes over the whole image."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from dist_defend.attacks.trigger import Additive, TriggerOptions, as_images


@dataclass(frozen=True)
class Stripes(TriggerOptions):
    """Every other stripe is brighter, the rest darker (an example; not published).

    Keys:
        width: of a stripe, in pixels
        amplitude: grey levels that are added to or taken from a pixel
    """

    name: Literal["stripes"] = "stripes"
    width: int = 2
    amplitude: float = 20.0

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"key 'width' is {self.width}; it must be at least 1 pixel")

    def build(self, image_size: int) -> Additive:
        """The trigger for square images of this side in pixels."""
        signs = 1 - 2 * (np.arange(image_size) // self.width % 2)
        return Additive(as_images(np.broadcast_to(self.amplitude * signs, (image_size, image_size))))
