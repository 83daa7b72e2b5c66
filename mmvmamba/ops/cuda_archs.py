"""Which GPUs the code in a CUDA binary runs on.

An entry such as ``"8.0"`` is machine code of that GPU generation, which runs on the same major version from that minor
on; ``+PTX`` adds an intermediate form that the driver compiles for anything newer.
"""

from __future__ import annotations

import functools
import re

# The names that PyTorch's build accepts in TORCH_CUDA_ARCH_LIST beside the numbers.
GENERATIONS = {
    "Kepler": "3.5+PTX",
    "Maxwell": "5.0;5.2+PTX",
    "Pascal": "6.0;6.1+PTX",
    "Volta": "7.0+PTX",
    "Turing": "7.5+PTX",
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
    "Kepler+Tesla": "3.7",
    "Maxwell+Tegra": "5.3",
    "Volta+Tegra": "7.2",
    "Ampere+Tegra": "8.7",
    "Blackwell+Tegra": "11.0",
}


@functools.cache
def covers(archs: tuple[str, ...], capability: tuple[int, int]) -> bool:
    """Return whether a binary with code for ``archs`` runs on a GPU of a compute capability.

    Args:
        archs: Entries of ``TORCH_CUDA_ARCH_LIST``, e.g. ``("8.0", "9.0+PTX")``; what cannot be read covers nothing.
        capability: Major and minor version of the GPU.
    """
    entries = (part for arch in archs for part in GENERATIONS.get(arch, arch).split(";"))
    return any(_covers(entry, capability) for entry in entries)


def _covers(entry: str, capability: tuple[int, int]) -> bool:
    match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
    if match is None:
        return False
    built = int(match[1]), int(match[2])
    if match[3] == "a":  # instructions of one GPU alone, in the intermediate form too
        return capability == built
    same_family = capability[0] == built[0] and capability[1] >= built[1]
    return same_family or (match[4] is not None and match[3] == "" and capability > built)
