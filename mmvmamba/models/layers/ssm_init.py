"""Initial values of the state-space parameters.

Sources: Mamba (https://arxiv.org/abs/2312.00752, section 3.6) for the time step, S4D-real
(https://arxiv.org/abs/2206.11893) for A, and VMamba (https://arxiv.org/abs/2401.10166) for the two simpler forms.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from mmvmamba.models.layers.checks import check_choice

SSMInit = Literal["mamba", "random", "zero"]
SSM_INITS: tuple[str, ...] = get_args(SSMInit)

DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 1e-1, 1e-4
_SIMPLE_DT_SCALE = 0.1


@torch.no_grad()
def init_ssm_(
    kind: SSMInit,
    dt_weight: Tensor,
    dt_bias: Tensor,
    a_logs: Tensor,
    skip: Tensor,
) -> None:
    """Fill the state-space parameters in place.

    ``"mamba"``: dt weight uniform in +-r^-0.5, softplus(dt bias) log-uniform in [1e-3, 1e-1], A = -(1..n).
    ``"random"``: A logs standard normal, dt weight and bias 0.1 times standard normal.
    ``"zero"``: A logs 0, dt weight and bias 0.1 times uniform in [0, 1). The skip is 1 in all three.

    Args:
        kind: One of the three forms.
        dt_weight: (k, d, r).
        dt_bias: (k, d).
        a_logs: (k * d, n).
        skip: (k * d,).

    Raises:
        ConfigError: If ``kind`` is unknown.
    """
    check_choice("ssm_init", kind, SSM_INITS)
    skip.fill_(1.0)
    if kind == "mamba":
        bound = dt_weight.shape[-1] ** -0.5
        dt_weight.uniform_(-bound, bound)
        init_dt_bias_(dt_bias)
        n = torch.arange(1, a_logs.shape[-1] + 1, dtype=torch.float32, device=a_logs.device)
        a_logs.copy_(n.log().expand_as(a_logs))
    elif kind == "random":
        a_logs.normal_()
        dt_weight.normal_(std=_SIMPLE_DT_SCALE)
        dt_bias.normal_(std=_SIMPLE_DT_SCALE)
    else:
        a_logs.zero_()
        dt_weight.uniform_(0.0, _SIMPLE_DT_SCALE)
        dt_bias.uniform_(0.0, _SIMPLE_DT_SCALE)


@torch.no_grad()
def init_dt_bias_(dt_bias: Tensor) -> None:
    """Fill ``dt_bias``, of any shape, in place so that its softplus is log-uniform in [1e-3, 1e-1]."""
    dt_bias.copy_(_inverse_softplus(_log_uniform(dt_bias)))


def _log_uniform(like: Tensor) -> Tensor:
    low, high = math.log(DT_MIN), math.log(DT_MAX)
    return torch.exp(torch.rand_like(like) * (high - low) + low).clamp(min=DT_FLOOR)


def _inverse_softplus(y: Tensor) -> Tensor:
    # log(exp(y) - 1) loses all digits for small y; this form does not.
    return y + torch.log(-torch.expm1(-y))
