"""Names that other repositories gave to the entries of their checkpoints."""

from __future__ import annotations

from torch import Tensor


def adapt(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the entries of a checkpoint under our names; what is not recognised comes back as it is."""
    return state_dict
