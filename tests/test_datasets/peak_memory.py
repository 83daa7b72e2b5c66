"""The most memory that this process has had, for programs that tests start."""

from __future__ import annotations

import re
from pathlib import Path


def peak_kibibytes() -> int:
    """Return the highest resident memory since the program began, in KiB.

    ``resource.getrusage`` counts what the process that started this one had at that moment, too.
    """
    return int(re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.M)[1])
