"""Whether the Triton kernels can run here; triton itself is imported only when somebody asks."""

from __future__ import annotations

import importlib.util
import os


def why_not_triton(device_type: str) -> str | None:
    """Return why the Triton kernels cannot run on ``device_type``, or None if they can.

    Args:
        device_type: As in ``tensor.device.type``.
    """
    if device_type not in ("cuda", "cpu"):
        return f"the Triton kernels run on cuda, not on {device_type}"
    if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton runs on a CPU only in its interpreter (TRITON_INTERPRET=1)"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        import triton  # noqa: F401
    except Exception as error:  # noqa: BLE001 - a broken installation may fail in any way, and is a reason like others
        return f"triton cannot be imported ({type(error).__name__}: {error})"
    return None
