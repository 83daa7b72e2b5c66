"""Our reader in the place of mmengine's, for every road on which mmengine loads weights.

``load_from``, ``--resume``, ``init_cfg`` of type Pretrained, the inferencers and publishing all end in mmengine's
``CheckpointLoader``, which chooses a function by the beginning of the name. Stock mmengine reads the file with
``weights_only=True`` and, where that is refused, **again without it**, which runs whatever the file holds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmvmamba.checkpoints.official import adapt
from mmvmamba.checkpoints.reader import read_checkpoint
from mmvmamba.checkpoints.stand_ins import HistoryRecord
from mmvmamba.errors import CheckpointError, nearest_spelling

#: As mmengine 0.10 names them, with what it knows beyond our own roads; all of them are refused or lead to ours.
_PREFIXES = (
    *("", "http://", "https://", "open-mmlab://", "openmmlab://", "mmcls://", "modelzoo://", "torchvision://"),
    *("pavi://", r"(\S+\:)?s3://", r"(\S+\:)?petrel://", r"[A-Za-z][A-Za-z0-9+.-]*://"),
)
_SCHEME = re.compile(r"\s*((?:\S+:)?[A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)


def install() -> None:
    """Let mmengine load every checkpoint through ``read_checkpoint``, whatever its name begins with.

    This holds for the whole process, also for models that are not ours: a file that needs more than tensors and plain
    values is refused from now on wherever mmengine loads it. Names such as ``pavi://`` and ``s3://`` are refused.
    """
    from mmengine.runner import CheckpointLoader

    # Those of the list, and whatever another library has registered by now.
    for prefix in {*_PREFIXES, *CheckpointLoader._schemes}:
        CheckpointLoader.register_scheme(prefix, load_from_mmvmamba, force=True)


def load_from_mmvmamba(filename: str, map_location: Any = None) -> dict[str, Any]:
    """Return the content of a checkpoint as mmengine's runner takes it; the names of weights are ours.

    Args:
        filename: A file, an https URL, or a name that mmengine's tables turn into one (``open-mmlab://``,
            ``torchvision://``, ``mmcls://``).
        map_location: Where the tensors go, as for ``torch.load``.

    Raises:
        CheckpointError: As ``read_checkpoint`` does, and for schemes that are not served.
    """
    content = read_checkpoint(located(str(filename)), map_location=map_location)
    state = content["state_dict"]
    if str(filename).startswith("mmcls://"):
        # As mmengine does: these are classifiers, and the backbone alone is meant.
        state = {key[len("backbone.") :]: value for key, value in state.items() if key.startswith("backbone.")}
    content["state_dict"] = adapt(state, repr(str(filename)))
    _restore_histories(content)
    return content


def located(filename: str) -> str:
    """Return the file or https URL that a name means.

    Raises:
        CheckpointError: If it begins with a scheme that is not served, or a table has no such name.
    """
    match = _SCHEME.match(filename)
    if not match or match.group(1) == "https":
        return filename
    scheme, name = match.groups()
    from mmengine.runner import checkpoint as stock

    if scheme in ("torchvision", "modelzoo"):
        return _looked_up(filename, name, stock.get_torchvision_models())
    if scheme == "mmcls":
        return _looked_up(filename, name, stock.get_mmcls_models())
    if scheme in ("open-mmlab", "openmmlab"):
        name = stock.get_deprecated_model_names().get(name, name)
        target = _looked_up(filename, name, stock.get_external_models())
        return target if "://" in target else str(Path(stock._get_mmengine_home()) / target)
    raise CheckpointError(
        f"checkpoint {filename!r} begins with {scheme}://, expected a file, an https URL, or a name of open-mmlab://, "
        "torchvision:// or mmcls://. Download it by a way you trust and name the file."
    )


def _looked_up(filename: str, name: str, table: Mapping[str, str | None]) -> str:
    found = table.get(name)
    # torchvision lists models that it has no weights of.
    if name in table and not found:
        raise CheckpointError(
            f"checkpoint {filename!r} is in mmengine's table without an address, expected a model with released "
            "weights. Name another, or a file."
        )
    if not found:
        raise CheckpointError(
            f"checkpoint {filename!r} is not in mmengine's table of {len(table)} names, expected one of them."
            f"{nearest_spelling(name, table)} Correct it, or name a file."
        )
    return found


def _restore_histories(content: dict[str, Any]) -> None:
    """Make the curves of a training mmengine's own objects again, bit for bit."""
    hub = content.get("message_hub")
    scalars = hub.get("log_scalars") if isinstance(hub, dict) else None
    if not isinstance(scalars, dict):
        return
    from mmengine.logging import HistoryBuffer

    for key, record in scalars.items():
        if isinstance(record, HistoryRecord):
            buffer = HistoryBuffer(max_length=record.max_length)
            buffer._log_history, buffer._count_history = record.log_history, record.count_history
            scalars[key] = buffer
