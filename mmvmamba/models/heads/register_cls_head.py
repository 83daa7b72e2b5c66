"""The classification head of networks with several register tokens: all of them, made narrower, side by side.

Papers: Mamba-Reg (https://arxiv.org/abs/2405.14858), used by ShuffleMamba-Reg (https://arxiv.org/abs/2408.17081).
Upstream: huangzizheng01/ShuffleMamba, models_reg.py (``neck``, ``norm_neck`` and ``head`` of its ``VisionMamba``).
"""

from __future__ import annotations

import functools
from typing import Any

from mmengine.model import BaseModule
from torch import Tensor, nn

from mmvmamba.errors import ConfigError
from mmvmamba.models.backbones.two_stream import TOKEN_NORMS, TokenNorm
from mmvmamba.models.layers import LayerNorm, check_choice
from mmvmamba.models.layers.norm import RMSNorm
from mmvmamba.registry import MODELS

NORM_EPS = 1e-5


# A function, so that a config can name it where MMPretrain is not installed.
@MODELS.register_module(name="RegisterClsHead")
def build_register_cls_head(
    num_classes: int,
    in_channels: int,
    num_registers: int,
    reduction: int = 1,
    norm: TokenNorm = "rms_norm",
    norm_eps: float = NORM_EPS,
    **settings: Any,
) -> BaseModule:
    """Build a head of an ``ImageClassifier`` of MMPretrain without a neck; its backbone returns its register tokens.

    Every register is mapped linearly to in_channels / reduction values, the same map for all; side by side they are
    normed and mapped to the scores. With ``reduction=1`` there is neither that map nor the norm.

    Args:
        num_classes: Number of classes.
        in_channels: Channels of one register.
        num_registers: Number of registers.
        reduction: How many times narrower a register becomes; a divisor of ``in_channels``.
        norm: ``"rms_norm"`` or ``"layer_norm"``, as in the backbone.
        norm_eps: What that norm adds to the variance, as in the backbone.
        settings: Arguments of ``ClsHead`` (``loss``, ``topk``, ``cal_acc``, ``init_cfg``), which refuses others.

    Raises:
        ConfigError: If a number is impossible or the norm unknown.
        ImportError: If MMPretrain is not installed.
    """
    numbers = dict(num_classes=num_classes, in_channels=in_channels, num_registers=num_registers, reduction=reduction)
    for name, value in numbers.items():
        if not isinstance(value, int) or value < 1:
            raise ConfigError(
                f"RegisterClsHead: {name} is {value!r}, expected an integer of at least 1. Use a larger value."
            )
    check_choice("norm", norm, TOKEN_NORMS)
    if in_channels % reduction:
        raise ConfigError(
            f"RegisterClsHead: reduction is {reduction}, expected a divisor of in_channels={in_channels}. Choose one."
        )
    return _head_class()(num_classes, in_channels, num_registers, reduction, norm, norm_eps, **settings)


@functools.cache
def _head_class() -> type[BaseModule]:
    from mmpretrain.models.heads import ClsHead

    class RegisterClsHead(ClsHead):
        """See ``build_register_cls_head``."""

        def __init__(
            self,
            num_classes: int,
            in_channels: int,
            num_registers: int,
            reduction: int,
            norm: TokenNorm,
            norm_eps: float,
            **settings: Any,
        ) -> None:
            super().__init__(**settings)
            self.num_classes, self.in_channels, self.num_registers = num_classes, in_channels, num_registers
            width = num_registers * (in_channels // reduction)
            self.neck: nn.Module = nn.Identity()
            self.norm: nn.Module = nn.Identity()
            if reduction > 1:
                self.neck = nn.Linear(in_channels, in_channels // reduction, bias=False)
                self.norm = (RMSNorm if norm == "rms_norm" else LayerNorm)(width, eps=norm_eps)
            self.fc = nn.Linear(width, num_classes)
            for layer in (self.neck, self.fc):
                if isinstance(layer, nn.Linear):
                    nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(self.fc.bias)

        def pre_logits(self, feats: tuple[Tensor, ...]) -> Tensor:
            """Return what the last map gets (b, k * d / reduction) for registers, of which the last (b, k * d) counts.

            Raises:
                ConfigError: If there are others than k registers of d channels.
            """
            width = self.num_registers * self.in_channels
            if feats[-1].ndim != 2 or feats[-1].shape[1] != width:
                raise ConfigError(
                    f"RegisterClsHead: the backbone returns {tuple(feats[-1].shape)}, expected (b, {width}), "
                    f"{self.num_registers} registers of {self.in_channels} channels side by side. Set "
                    "out_type='cls_token' in the backbone, and num_registers and in_channels as it has them."
                )
            registers = feats[-1].unflatten(1, (self.num_registers, self.in_channels))
            return self.norm(self.neck(registers).flatten(1))

        def forward(self, feats: tuple[Tensor, ...]) -> Tensor:
            """Return the scores (b, classes) for registers, of which the last (b, k * d) counts."""
            return self.fc(self.pre_logits(feats))

    return RegisterClsHead
