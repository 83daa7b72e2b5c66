"""What a state dict is, told from its names and shapes, and its entries under our names.

A door to ``mmvmamba.converters``, which alone knows the names of other repositories. It is opened inside the functions:
converters are built on models, and models load checkpoints, so an import at the top would be a circle. This is the one
place of this part that reaches up, and only to ask.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping

from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Recognition:
    """What a state dict is.

    Attributes:
        family: A key of ``mmvmamba.converters.CONVERTERS``.
        title: The family's name for people.
        variant: A released variant such as ``"tiny-s1l8"``, or None for a network of another size.
        sketch: Its size in words.
        form: ``"classifier"``, ``"backbone"``, ``"adapter"``, ``"detector"``, ``"segmentor"`` or ``"model"`` (something
            else around a backbone).
        prefix: What the backbone's names begin with, ``""`` or closed by a dot.
        upstream: Whether some of the names are upstream's and not ours.
        adapter: Whether the backbone is the trunk of an adapter, whose entries count to it.
    """

    family: str
    title: str
    variant: str | None
    sketch: str
    form: str
    prefix: str
    upstream: bool
    adapter: bool = False

    def __str__(self) -> str:
        """Return such as ``"VMamba tiny-s1l8 (classifier)"``."""
        return f"{self.title} {self.variant or self.sketch} ({self.form})"


def recognise(state_dict: Mapping[str, Tensor]) -> Recognition | None:
    """Return family, variant and form of a state dict, or None if it is of no family known here.

    Args:
        state_dict: Names to tensors; values are not looked at, so the meta device does.

    Without MMEngine, which the converters need, nothing is known.
    """
    if importlib.util.find_spec("mmengine") is None:
        return None
    from mmvmamba.converters import recognition

    return recognition.recognise(state_dict)


def adapt(state_dict: dict[str, Tensor], source: str = "") -> dict[str, Tensor]:
    """Return the entries of an official file under our names; what is not recognised comes back as it is.

    An official classifier gets the names of an MMPretrain classifier (``backbone.``, ``head.``), and in a detector
    or segmentor the names of early releases become the present ones. Values and shapes stay as they are: the layers
    load the weights of a 1x1 convolution for a linear map by themselves. Our own names stay as they are.

    Args:
        state_dict: Names to tensors.
        source: The checkpoint, for messages.

    Raises:
        CheckpointMismatch: If old and new names stand for the same entry.
    """
    from mmvmamba.converters import recognition

    return recognition.adapt(state_dict, source)
