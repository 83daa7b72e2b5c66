"""EfficientViM: Efficient Vision Mamba with Hidden State Mixer based State Space Duality (arXiv 2411.15241, CVPR 2025).

Upstream: mlvlab/EfficientViM, classification/models/EfficientViM.py and its copies in detection/ and segmentation/
(``EfficientViM``). Differences: the map is channels-last throughout, every image size works in every form (upstream's
classifier takes squares), stochastic depth can be asked for (upstream has none), and the weights of layer norms have no
weight decay (upstream spares vectors, and its norms are stored with two or three axes).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmvmamba.errors import ConfigError
from mmvmamba.models.backbones.arch import check_stages, resolve_arch
from mmvmamba.models.backbones.base import BaseBackbone, Block, Stage
from mmvmamba.models.layers import (
    ChannelsLastConv2d,
    ConvBN,
    ConvMlp,
    DropPath,
    LayerNorm,
    MobileMerging,
    MobileStem,
    PointwiseConv2d,
    ResidualDepthwise,
    check_choice,
    convolve_depthwise,
    deployed,
    drop_path_schedule,
)
from mmvmamba.ops import ssd_read, ssd_state
from mmvmamba.ops.ssd.heads import accumulation
from mmvmamba.registry import MODELS

_STATE, _READ = torch.ops.mmvmamba.ssd_state.default, torch.ops.mmvmamba.ssd_read.default
OutType = Literal["featmap", "hidden_states"]
OUT_TYPES: tuple[str, ...] = get_args(OutType)
A_MIN, A_MAX = 1.0, 16.0
#: Where the gates of all steps start, before their sigmoid: half of what goes in, half of what is new.
ALPHA = 1e-4
#: Hidden channels of a merging as a multiple of those behind it.
_MERGING = 4


@dataclasses.dataclass(frozen=True)
class EfficientViMArch:
    """Everything that distinguishes one EfficientViM from another.

    Attributes:
        dims: Channels of every stage.
        depths: Blocks of every stage.
        state_dims: States n of the mixers of every stage.
        mlp_ratio: Hidden channels of the perceptron as a multiple of the stage's, rounded down.
        expansion: Channels of the gated hidden states as a multiple of the stage's, rounded down.
        drop_path_rate: Stochastic depth; no released model has any.
    """

    dims: tuple[int, ...]
    depths: tuple[int, ...]
    state_dims: tuple[int, ...]
    mlp_ratio: float = 4.0
    expansion: float = 1.0
    drop_path_rate: float = 0.0

    def __post_init__(self) -> None:
        """Check what no layer checks by itself."""
        check_stages(dims=self.dims, depths=self.depths, state_dims=self.state_dims)
        for name in ("mlp_ratio", "expansion"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or int(value * min(self.dims)) < 1:
                raise ConfigError(
                    f"arch: {name} is {value!r}, expected a number that leaves at least one of the {min(self.dims)} "
                    "channels of the narrowest stage. Raise it."
                )


_SMALL_STATES, _WIDE = (49, 25, 9), (224, 320, 512)

ARCHS: dict[str, EfficientViMArch] = {
    "m1": EfficientViMArch((128, 192, 320), (2, 2, 2), _SMALL_STATES),
    "m2": EfficientViMArch((128, 256, 512), (2, 2, 2), _SMALL_STATES),
    "m3": EfficientViMArch(_WIDE, (2, 2, 2), _SMALL_STATES),
    "m4": EfficientViMArch(_WIDE, (3, 4, 2), (64, 32, 16)),
    # For demos and tests on a CPU; not a model of the paper.
    "nano": EfficientViMArch((16, 24, 32), (1, 2, 1), (9, 5, 3)),
}


class HiddenStateMixer(nn.Module):
    """State-space duality without an order of the tokens, whose channels are mixed in the state instead of the tokens.

    Every token writes to n states of c channels, with weights that a softmax over all tokens makes of its time steps;
    gate and output projection act on the states, of which there are fewer than tokens; every token reads them.

    Upstream quirks, kept because weights depend on them: a depthwise convolution without norm and activation is behind
    the projection to B, C and time steps; the skip D is one number. ``A`` is added to the time steps of all tokens,
    which the softmax takes out again: it has no influence, and its gradient is zero.

    Args:
        channels: Channels c of input and output.
        state_dim: Number n of states.
        expansion: Channels of the gated states as a multiple of ``channels``.
    """

    def __init__(self, channels: int, state_dim: int, expansion: float = 1.0) -> None:
        super().__init__()
        self.state_dim = state_dim
        inner = int(expansion * channels)
        self.A = nn.Parameter(torch.empty(state_dim).uniform_(A_MIN, A_MAX))
        self.D = nn.Parameter(torch.ones(1))
        self.BCdt_proj = PointwiseConv2d(channels, 3 * state_dim, bias=False)
        self.dw = ChannelsLastConv2d(3 * state_dim, 3 * state_dim, 3, padding=1, groups=3 * state_dim, bias=False)
        self.hz_proj = PointwiseConv2d(channels, 2 * inner, bias=False)
        self.out_proj = PointwiseConv2d(inner, channels, bias=False)
        #: Whether this is the deployment form.
        self.folded = False

    def no_weight_decay(self) -> set[str]:
        """Return the parameters of its own that a recipe must not pull towards zero."""
        return {"A", "D"}

    def fold_batch_norms(self) -> None:
        """Lay the weights out as deployed operators read them. For `mmvmamba.models.deploy` alone."""
        for conv in (self.BCdt_proj, self.hz_proj, self.out_proj):
            deployed.in_operator_order(conv)
        self.requires_grad_(False)
        self.folded = True

    def forward(self, x: Tensor, gate: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return what the tokens read and the hidden states (b, n, c), before that, for a map ``x`` (b, h, w, c).

        Args:
            x: The map.
            gate: What the channels of the former (b, h, w, c) are multiplied by (c,), or None.
        """
        if self.folded and deployed.runs_directly(x, self.BCdt_proj, self.dw, self.hz_proj, self.out_proj):
            return self._directly(x, gate)
        projected = convolve_depthwise(self.dw, self.BCdt_proj(x)).flatten(1, 2)
        b_in, c_out, dt = projected.split(self.state_dim, dim=-1)
        tokens = x.flatten(1, 2)
        state = ssd_state(tokens.unsqueeze(2), None, self._written(dt, b_in).unsqueeze(2)).squeeze(1)
        hidden = self._mix(state.to(tokens.dtype))
        read = hidden if gate is None else hidden * gate
        out = ssd_read(read.unsqueeze(1), c_out.unsqueeze(2), out_dtype=tokens.dtype)
        return out.reshape(x.shape), hidden

    def _directly(self, x: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return what ``forward`` does, by the operators without their checks: those take longer than these maps do."""
        b, h, w, c = x.shape
        projected = deployed.convolve(deployed.convolve(x, self.BCdt_proj), self.dw).view(b, h * w, 3, self.state_dim)
        b_in, c_out, dt = projected.unbind(2)
        written = dt.softmax(1).mul_(b_in)
        state = _STATE(x.reshape(b, h * w, 1, c), None, written.unsqueeze(2), False)
        mixed, z = deployed.multiply_rows(state.view(-1, c), self.hz_proj).chunk(2, dim=-1)
        hidden = deployed.multiply_rows(F.silu(z).add_(self.D).mul_(mixed), self.out_proj).view(b, -1, c)
        read = hidden if gate is None else hidden * gate
        out = _READ(read.unsqueeze(1), c_out.unsqueeze(2), False, x.dtype)
        return out.view(x.shape), hidden

    def _written(self, dt: Tensor, b_in: Tensor) -> Tensor:
        """Return how much a token adds to a state, (b, l, n), of its time steps and projections of that shape."""
        accumulate = accumulation(dt.dtype)
        dt = dt.to(accumulate)
        if torch.is_grad_enabled():
            # Distributed training waits for a gradient. This one is exactly zero; that of A itself would be noise.
            dt = dt + 0 * self.A.to(accumulate)
        return dt.softmax(1) * b_in

    def _mix(self, state: Tensor) -> Tensor:
        """Mix the channels of the states (b, n, c)."""
        h, z = self.hz_proj(state).chunk(2, dim=-1)
        return self.out_proj(h * (F.silu(z) + self.D))


class EfficientViMBlock(Block):
    """Depthwise convolution, mixer, depthwise convolution, perceptron.

    Each is mixed with what it gets, ``(1 - a) x + a f(x)``, where a is a sigmoid of a parameter per channel.

    Args:
        channels: Channels of input and output.
        state_dim: States of the mixer.
        arch: The options of all blocks.
        drop_path: Probability with which mixer and perceptron leave a sample as it is.
    """

    def __init__(self, channels: int, state_dim: int, arch: EfficientViMArch, drop_path: float) -> None:
        super().__init__()
        self.alpha: nn.Parameter | None = nn.Parameter(torch.full((4, channels), ALPHA))
        #: In the deployment form what the gates of mixer and perceptron leave of x (2, c), and the former's gate (c,).
        self.kept: nn.Parameter | None = None
        self.gate: nn.Parameter | None = None
        self.mixer = HiddenStateMixer(channels, state_dim, arch.expansion)
        self.norm = LayerNorm(channels)
        self.dwconv1 = ConvBN(channels, channels, 3, groups=channels)
        self.dwconv2 = ConvBN(channels, channels, 3, groups=channels)
        self.ffn = ConvMlp(channels, int(channels * arch.mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the map (b, h, w, c) and the mixer's hidden states (b, n, c) for a map ``x`` (b, h, w, c)."""
        if self.alpha is None:
            return self._folded(x)
        gates = self.alpha.sigmoid().unbind(0)
        x = mix(x, self.dwconv1(x), gates[0])
        mixed, hidden = self.mixer(self.norm(x))
        x = mix(x, mixed, gates[1], self.drop_path)
        x = mix(x, self.dwconv2(x), gates[2])
        return mix(x, self.ffn(x), gates[3], self.drop_path), hidden

    def _folded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Do the same in the deployment form, where the gates are in the weights as far as they can be."""
        of_mixer, of_ffn = cast("nn.Parameter", self.kept).unbind(0)
        x = self.dwconv1(x)
        mixed, hidden = self.mixer(self.norm(x), self.gate)
        x = self.dwconv2(torch.addcmul(mixed, x, of_mixer))
        return torch.addcmul(self.ffn(x), x, of_ffn), hidden

    @torch.no_grad()
    def fold_batch_norms(self) -> None:
        """Make the gates parts of the folded convolutions. For `mmvmamba.models.deploy` alone."""
        alpha = cast("nn.Parameter", self.alpha)
        gates = alpha.double().sigmoid()
        for layer, gate in ((self.dwconv1, gates[0]), (self.dwconv2, gates[2]), (self.ffn.fc2, gates[3])):
            conv = layer.conv
            for parameter in conv.parameters():
                parameter.copy_(parameter * gate.view(-1, *[1] * (parameter.ndim - 1)))
            if layer is not self.ffn.fc2:
                conv.weight[:, 0, 1, 1] += (1 - gate).to(conv.weight.dtype)
        self.kept = nn.Parameter((1 - gates[1::2]).to(alpha.dtype), requires_grad=False)
        self.gate = nn.Parameter(gates[1].to(alpha.dtype), requires_grad=False)
        self.alpha = None
        self.norm.requires_grad_(False)


class Downsample(nn.Module):
    """A merging of patches between two residual depthwise convolutions; ceil(n / 2) tokens a side remain."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.merging = MobileMerging(channels, out_channels, _MERGING * out_channels)
        self.dwconv1 = ResidualDepthwise(channels)
        self.dwconv2 = ResidualDepthwise(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (b, h, w, c) to (b, ceil(h / 2), ceil(w / 2), c')."""
        out: Tensor = self.dwconv2(self.merging(self.dwconv1(x)))
        return out


@MODELS.register_module()
class EfficientViM(BaseBackbone):
    """EfficientViM as a feature extractor. Stage i has ceil(h / (16 * 2**i)) rows, and columns likewise.

    Upstream's detectors and segmentors train with ``norm_eval=True``, and use the maps as they are, without norms.

    Args:
        arch: Name of a variant (a key of ``ARCHS``) or a dict with the fields of ``EfficientViMArch``.
        in_channels: Channels of the image.
        out_indices: Stages whose output is returned, in rising order.
        out_type: What is returned: ``"featmap"`` the maps of these stages; ``"hidden_states"`` the hidden states of
            their last blocks, and behind them the map of the last of these stages, as ``EfficientViMClsHead`` wants it.
        drop_path_rate: Stochastic depth of the last block; None takes the variant's own, which is 0.
        frozen_stages, norm_eval, with_cp, init_cfg: See ``BaseBackbone``.

    Raises:
        ConfigError: If an option is unknown, misspelt or impossible.
    """

    stem_stride = 16

    def __init__(
        self,
        arch: str | Mapping[str, Any] | EfficientViMArch = "m1",
        *,
        in_channels: int = 3,
        out_indices: Sequence[int] = (0, 1, 2),
        out_type: OutType = "featmap",
        drop_path_rate: float | None = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        init_cfg: dict | list[dict] | None = None,
        **unknown: Any,
    ) -> None:
        self.reject_unknown(unknown)
        self.arch = resolve_arch(arch, ARCHS, EfficientViMArch)
        check_choice("out_type", out_type, OUT_TYPES)
        self.out_type = out_type
        super().__init__(in_channels, self.arch.depths, out_indices, frozen_stages, norm_eval, with_cp, init_cfg)
        dims, rate = self.arch.dims, self.arch.drop_path_rate if drop_path_rate is None else drop_path_rate
        self.patch_embed = MobileStem(in_channels, dims[0])
        rates = drop_path_schedule(rate, self.depths)
        self.layers = nn.ModuleList()
        for i, (dim, state_dim) in enumerate(zip(dims, self.arch.state_dims, strict=True)):
            blocks = [EfficientViMBlock(dim, state_dim, self.arch, block_rate) for block_rate in rates[i]]
            last = i == len(dims) - 1
            self.layers.append(Stage(blocks, nn.Identity() if last else Downsample(dim, dims[i + 1])))
        self.freeze()

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return what ``out_type`` says for an image (b, c, h, w): one contiguous tensor per entry of ``out_indices``.

        With ``"hidden_states"`` it is one more, the last map. Maps are (b, c_i, h_i, w_i), states (b, n_i, c_i).

        Raises:
            OpInputError: If the image has another number of channels, an integer dtype or an empty side.
        """
        self.check_input(image)
        x = self.patch_embed(image)
        maps, states = [], []
        last = self.out_indices[-1]
        for i, layer in enumerate(cast("Iterable[Stage]", self.layers)):
            for block in layer.blocks:
                x, hidden = cast("tuple[Tensor, Tensor]", self.run_block(block, x))
            if i in self.out_indices:
                states.append(hidden)
                if i == last or self.out_type == "featmap":
                    maps.append(self.collect(i, x))
            if i == last:
                break
            x = layer.downsample(x)
        return tuple(maps) if self.out_type == "featmap" else (*states, *maps)


def mix(x: Tensor, new: Tensor, gate: Tensor, drop_path: DropPath | None = None) -> Tensor:
    """Return ``(1 - gate) * x + gate * new`` of maps (b, h, w, c) and a gate (c,), in the widest of their types.

    Args:
        x: What goes into a step.
        new: What comes out of it.
        gate: How much of the latter is taken.
        drop_path: What leaves some samples as they were.
    """
    if not x.dtype is new.dtype is gate.dtype:
        dtype = torch.promote_types(torch.promote_types(x.dtype, new.dtype), gate.dtype)
        x, new, gate = x.to(dtype), new.to(dtype), gate.to(dtype)
    if drop_path is not None and drop_path.training and drop_path.rate > 0.0:
        return x + drop_path(gate * (new - x))
    return torch.lerp(x, new, gate)
