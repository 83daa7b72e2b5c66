"""The kernels alone under AddressSanitizer and UndefinedBehaviorSanitizer, on a few of the inputs of `make sanitize`.

Here and not with the tests of the operators because it needs the sources, which an installed package has not.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_baseline_kernels_give_no_report(root: Path) -> None:
    done = subprocess.run(
        ["scripts/sanitize.sh", "--baseline", "300"], cwd=root, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counts = re.findall(r"(\d+) inputs on baseline: (\d+) results compared, (\d+) failures", done.stdout)
    assert sum(int(inputs) for inputs, _, _ in counts) == 300
    assert sum(int(compared) for _, compared, _ in counts) > 1000
    assert all(failures == "0" for _, _, failures in counts)


def test_a_count_that_is_none_is_refused(root: Path) -> None:
    done = subprocess.run(["scripts/sanitize.sh", "many"], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "whole number, not 'many'" in done.stderr
