"""Forward and backward of small samples, to be run under compute-sanitizer: DEVICE BACKEND COUNT."""

from __future__ import annotations

import sys
import types
from pathlib import Path


def main(device: str, backend: str, count: int) -> None:
    """Run ``count`` samples and print how many."""
    # Some packages install a top-level "tests" of their own, which would be found before a folder without __init__.py.
    ours = types.ModuleType("tests")
    ours.__path__ = [str(Path(__file__).parents[1])]
    sys.modules["tests"] = ours
    from tests import gpu_checks

    for sample in gpu_checks.configurations(count):
        gpu_checks.forward_backward(gpu_checks.on(sample, device), backend)
    print(f"ran {count} configurations")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
