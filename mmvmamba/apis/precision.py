"""Choosing the optimizer wrapper for float32 or mixed precision, by flags, config and machine."""

from __future__ import annotations

import torch
from mmengine.config import Config
from mmengine.device import get_device

from mmvmamba.apis.resume import Note
from mmvmamba.errors import ConfigError

_PLAIN, _MMENGINES, _OURS = "OptimWrapper", "AmpOptimWrapper", "Bfloat16OptimWrapper"
_SETTINGS = ("loss_scale", "dtype", "use_fsdp")  # of AmpOptimWrapper, the others have none


def choose_precision(cfg: Config, amp: bool | None) -> list[Note]:
    """Set the optimizer wrapper of ``cfg`` in place, and return lines for the log.

    Args:
        cfg: From ``load_config``.
        amp: True for mixed precision, False for float32, None for what the config says and the machine can do.

    Raises:
        ConfigError: If mixed precision is asked for on a CPU that does not multiply bfloat16, or a flag with an
            optimizer wrapper it does not know.
    """
    name = _wrapper_name(cfg)
    on_cpu = get_device() == "cpu"
    if amp is not None and name not in (_PLAIN, _MMENGINES, _OURS):
        flag = "--amp" if amp else "--no-amp"
        raise ConfigError(
            f"{flag}: optim_wrapper.type is {name!r}, expected {_PLAIN!r}, {_MMENGINES!r} or {_OURS!r}. Set the "
            f"precision in the config itself, or drop {flag}."
        )
    if amp is False:
        return _set_float32(cfg, "--no-amp") if name != _PLAIN else []
    if amp:
        _set_mixed(cfg, name, on_cpu)
        return []
    if not on_cpu or name not in (_MMENGINES, _OURS):
        return []
    if not _cpu_multiplies_bfloat16():
        return _set_float32(cfg, "this CPU has no bfloat16 instructions")
    if name == _OURS:
        return []
    _set_ours(cfg)
    return [
        Note(f"There is no GPU: backbone and neck are trained in bfloat16 by mmvmamba.{_OURS}, not by {_MMENGINES}.")
    ]


def _wrapper_name(cfg: Config) -> str:
    kind = (cfg.get("optim_wrapper") or {}).get("type", _PLAIN)
    return (kind if isinstance(kind, str) else kind.__name__).rpartition(".")[2]


def _set_mixed(cfg: Config, name: str, on_cpu: bool) -> None:
    if on_cpu:
        if not _cpu_multiplies_bfloat16():
            raise ConfigError(
                "--amp: this CPU has no bfloat16 instructions, expected them or an accelerator: emulated, bfloat16 is "
                "slower than float32. Drop --amp."
            )
        _set_ours(cfg)
    elif name != _OURS:
        if name == _PLAIN:
            cfg.optim_wrapper.type = _MMENGINES
        cfg.optim_wrapper.setdefault("loss_scale", "dynamic")


def _set_ours(cfg: Config) -> None:
    cfg.optim_wrapper.type = f"mmvmamba.{_OURS}"
    _drop_settings(cfg)


def _set_float32(cfg: Config, reason: str) -> list[Note]:
    cfg.optim_wrapper.type = _PLAIN
    _drop_settings(cfg)
    return [Note(f"All of the model is trained in float32: {reason}.")]


def _drop_settings(cfg: Config) -> None:
    for setting in _SETTINGS:
        cfg.optim_wrapper.pop(setting, None)


def _cpu_multiplies_bfloat16() -> bool:
    # Other builds of PyTorch may lack the operator, and then the fast products, too.
    return hasattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported") and torch.ops.mkldnn._is_mkldnn_bf16_supported()
