"""ViT-adapter: a columnar backbone as the trunk of a detector with maps of four sizes.

Paper: Vision Transformer Adapter for Dense Predictions (https://arxiv.org/abs/2205.08534). Upstream: ChenhongyiYang/
PlainMamba, downstream/mmdetection (``PlainMambaAdapter``), and huangzizheng01/ShuffleMamba, models_openmm.py
(``Mamba_Adapter``), which differ in one option. Differences: it wraps any columnar backbone, any image size works
(upstream's sides are multiples of 32), maps are channels-last inside, and what it adds to a trunk has names of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, cast, get_args

import torch
from mmengine.logging import print_log
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from mmvmamba.checkpoints.matching import check, load
from mmvmamba.errors import ConfigError
from mmvmamba.models.adapters.parts import (
    ADAPTER_NORMS,
    AdapterNorm,
    Doubling,
    Extractor,
    Injector,
    Interaction,
    SpatialPrior,
    build_map_norm,
    init_like_upstream_,
)
from mmvmamba.models.backbones.base import BaseBackbone, check_out_indices
from mmvmamba.models.backbones.columnar import ColumnarBackbone
from mmvmamba.models.layers import DropPath, check_choice
from mmvmamba.models.layers.deformable_attention import Grid, cell_centres
from mmvmamba.models.pretrained import read_weights, split_init_cfg
from mmvmamba.registry import MODELS

TrunkFeatures = Literal["last", "each", "none"]
TRUNK_FEATURES: tuple[str, ...] = get_args(TrunkFeatures)
#: Strides of the maps it returns; a trunk's is that of the third.
STRIDES = (4, 8, 16, 32)
_TRUNK_STRIDE = 16


@MODELS.register_module()
class ViTAdapter(BaseModule):
    """A trunk of one width with a pyramid of maps beside it, which see each other several times.

    Map i has ceil(h / (4 * 2**i)) rows, and columns likewise, of as many channels as the trunk. An image
    whose sides are no multiples of 32 is padded with zeros at the right and bottom, as mmdet's ``pad_size_divisor=32``
    would, and the maps are cropped.

    Args:
        backbone: A columnar backbone or its config, such as ``dict(type='mmvmamba.PlainMamba', arch='l1')``. It must
            have no class tokens; its ``out_indices`` are not used, and its output norms neither.
        out_indices: Which of the four maps are returned, in rising order. RetinaNet wants ``(1, 2, 3)``; what only the
            others need is neither computed nor trained.
        interaction_indexes: First and last layer, both included, of the part of the trunk in each interaction; None
            cuts it into four equal parts.
        spatial_channels: Channels of the first map of the convolutions beside the trunk.
        num_heads, num_points, value_ratio: Of the deformable attentions, see ``DeformableAttention``.
        ffn_ratio: Hidden channels of an extractor's perceptron as a multiple of the trunk's.
        with_ffn: Whether extractors have a perceptron.
        extra_extractors: How many more extractors the last interaction has.
        trunk_features: What of the trunk is added to the four maps: the tokens after the ``"last"`` interaction to all
            (PlainMamba), those after ``"each"`` of four interactions to one (ShuffleMamba, ViT-Adapter), or ``"none"``.
        injector_scale: Initial weight of what the trunk gets from the pyramid.
        drop_path_rate: Stochastic depth of the perceptrons, the same in all; None takes that of the trunk's last layer.
        norm: Kind of the norms of maps; ``"synchronised_batch_norm"``, as upstream trains, has the statistics of all
            processes.
        norm_eval: Whether batch norms of the adapter keep their running statistics while training; the trunk has an
            option of its own.
        init_cfg: ``dict(type='Pretrained', checkpoint=..., prefix='backbone.')`` loads the whole adapter, such as the
            backbone of a detector. A classifier's weights start the trunk alone: give them to ``backbone``.

    Raises:
        ConfigError: If an option is unknown, misspelt or contradicts the trunk.
    """

    def __init__(
        self,
        backbone: Mapping[str, Any] | ColumnarBackbone,
        *,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        interaction_indexes: Sequence[Sequence[int]] | None = None,
        spatial_channels: int = 64,
        num_heads: int = 6,
        num_points: int = 4,
        value_ratio: float = 1.0,
        ffn_ratio: float = 0.25,
        with_ffn: bool = True,
        extra_extractors: int = 2,
        trunk_features: TrunkFeatures = "last",
        injector_scale: float = 0.0,
        drop_path_rate: float | None = None,
        norm: AdapterNorm = "batch_norm",
        norm_eval: bool = False,
        init_cfg: dict | list[dict] | None = None,
        **unknown: Any,
    ) -> None:
        BaseBackbone.reject_unknown.__func__(type(self), unknown)  # type: ignore[attr-defined]
        super().__init__(init_cfg=init_cfg)
        trunk = MODELS.build(dict(backbone)) if isinstance(backbone, Mapping) else backbone
        check_trunk(trunk)
        check_choice("norm", norm, ADAPTER_NORMS)
        check_choice("trunk_features", trunk_features, TRUNK_FEATURES)
        self.backbone: ColumnarBackbone = trunk
        self.trunk_features, self.norm_eval = trunk_features, norm_eval
        self.out_indices = check_out_indices(out_indices, len(STRIDES))
        self.interaction_indexes = check_interactions(interaction_indexes, len(trunk.depths))
        if trunk.out_indices[-1] < self.interaction_indexes[-1][1]:
            raise ConfigError(
                f"ViTAdapter: backbone has out_indices {trunk.out_indices}, behind which layers are not trained, "
                f"expected one up to {self.interaction_indexes[-1][1]}. Leave out_indices out."
            )
        if trunk_features == "each" and len(self.interaction_indexes) != len(STRIDES):
            raise ConfigError(
                f"interaction_indexes has {len(self.interaction_indexes)} parts, expected {len(STRIDES)} with "
                "trunk_features='each': one for each map. Cut it so, or choose 'last'."
            )
        dim = trunk.stage_channels[0]
        rate = _highest_drop_path(trunk) if drop_path_rate is None else drop_path_rate
        hidden = int(dim * ffn_ratio) if with_ffn else None
        attention = (num_heads, num_points, value_ratio)
        self.spm = SpatialPrior(trunk.in_channels, spatial_channels, dim, norm)
        self.level_embed = nn.Parameter(torch.randn(len(STRIDES) - 1, dim))
        self.interactions = nn.ModuleList()
        for i in range(len(self.interaction_indexes)):
            extra = extra_extractors if i == len(self.interaction_indexes) - 1 else 0
            injector = Injector(dim, *attention, injector_scale)
            first, *others = (Extractor(dim, *attention, hidden, rate) for _ in range(1 + extra))
            self.interactions.append(Interaction(injector, first, others))
        self.up = Doubling(dim)
        self.norm1, self.norm2, self.norm3, self.norm4 = (build_map_norm(norm, dim) for _ in STRIDES)
        for part in (self.spm, self.interactions, self.up):
            init_like_upstream_(part)
        self._freeze_unused()

    @property
    def stage_channels(self) -> tuple[int, ...]:
        """Channels of the four maps, which a neck wants as ``in_channels``."""
        return (self.backbone.stage_channels[0],) * len(STRIDES)

    @property
    def stage_strides(self) -> tuple[int, ...]:
        """Pixels of the image per cell of the four maps, along a side."""
        return STRIDES

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return one contiguous map (b, d, h', w') per entry of ``out_indices`` for an image (b, c, h, w).

        Raises:
            OpInputError: If the image has another number of channels, an integer dtype or an empty side.
        """
        self.backbone.check_input(image)
        h, w = image.shape[2:]
        below, right = -h % STRIDES[-1], -w % STRIDES[-1]
        # Sides that an export leaves open are not looked at: it pads always, perhaps by nothing.
        if not (statically_known_true(below == 0) and statically_known_true(right == 0)):
            image = F.pad(image, (0, right, 0, below))
        maps = self._maps(image)
        outs = []
        for i in self.out_indices:
            rows, columns = (-(-side // STRIDES[i]) for side in (h, w))
            norm = getattr(self, f"norm{i + 1}")
            outs.append(norm(maps[i])[:, :rows, :columns].permute(0, 3, 1, 2).contiguous())
        return tuple(outs)

    def _maps(self, image: Tensor) -> dict[int, Tensor]:
        """Return the maps (b, h', w', d) of ``out_indices`` before their norms; sides of the image divide by 32."""
        has_first = 0 in self.out_indices
        c1, *others = self.spm(image, has_first)
        grids: list[Grid] = [(level.shape[1], level.shape[2]) for level in others]
        grid = grids[1]
        c = torch.cat([level.flatten(1, 2) + self.level_embed[i] for i, level in enumerate(others)], dim=1)
        centres = cell_centres(grids, image.device)
        areas = [rows * columns for rows, columns in grids]
        places = centres[areas[0] : areas[0] + areas[1]]

        x, layout = self.backbone.embed(image)
        residual: Tensor | None = None  # a second stream that some trunks have; the pyramid never sees it
        seen: list[Tensor] = []
        for interaction, (first, last) in zip(
            cast("Iterable[Interaction]", self.interactions), self.interaction_indexes, strict=True
        ):
            x = interaction.injector(x, places, c, grids)
            # Upstream's adapters call the layers themselves, and so past the layer-wise shuffle.
            x, residual = self.backbone.run_layers(x, residual, layout, range(first, last + 1), shuffle=False)
            c = interaction.extract(c, centres, x, grid, grids)
            seen.append(x)
        pyramid = [m.unflatten(1, side) for m, side in zip(c.split(areas, dim=1), grids, strict=True)]
        maps = {i: pyramid[i - 1] for i in self.out_indices if i > 0}
        if has_first:
            maps[0] = self.up(pyramid[0]) + c1
        if self.trunk_features == "none":
            return maps
        tokens = seen if self.trunk_features == "each" else [seen[-1]] * len(STRIDES)
        return {i: m + _resize(tokens[i].unflatten(1, grid), m) for i, m in maps.items()}

    def _freeze_unused(self) -> None:
        """Turn off gradients of what no map depends on: output norms of the trunk, layers and maps left out."""
        unused: list[nn.Module] = [
            getattr(self, f"norm{i + 1}") for i in range(len(STRIDES)) if i not in self.out_indices
        ]
        for part in unused if 0 in self.out_indices else [*unused, self.up, self.spm.fc1]:
            part.requires_grad_(False)
        used = {layer for first, last in self.interaction_indexes for layer in range(first, last + 1)}
        for name, parameter in self.backbone.named_parameters():
            part, *rest = name.split(".")
            if not (part in self.backbone.stem_names or (part == "layers" and int(rest[0]) in used)):
                parameter.requires_grad_(False)

    def train(self, mode: bool = True) -> ViTAdapter:
        """Set training mode; frozen parts of the trunk, and batch norms if ``norm_eval``, stay in evaluation mode.

        Raises:
            ConfigError: If the batch norms were converted to PyTorch's synchronised ones, which take channels-first
                maps only.
        """
        super().train(mode)
        for name, module in self._own_modules():
            if mode and type(module).__name__ == "SyncBatchNorm":
                raise ConfigError(
                    f"ViTAdapter: norms such as {name!r} became SyncBatchNorm, expected the channels-last batch norms "
                    "they were built with. Remove sync_bn from the config and choose norm='synchronised_batch_norm'."
                )
            if self.norm_eval and isinstance(module, _BatchNorm):
                module.eval()
        self._freeze_unused()
        return self

    def _own_modules(self) -> Iterator[tuple[str, nn.Module]]:
        return ((name, m) for name, m in self.named_modules() if not name.startswith("backbone."))

    def get_layer_depth(self, param_name: str, prefix: str = "") -> tuple[int, int]:
        """Return the depth of a parameter and the number of depths, for layer-wise learning rate decay.

        Those of the trunk's parameters are the trunk's; all else has the last depth, which is trained at full rate.

        Args:
            param_name: Name of the parameter in the whole model.
            prefix: Name of the adapter in the whole model, such as ``"backbone."``.
        """
        return self.backbone.get_layer_depth(param_name, prefix + "backbone.")

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters that are trained without weight decay: norms, biases and more."""
        names = {f"backbone.{name}" for name in self.backbone.no_weight_decay()} | {"level_embed"}
        for prefix, module in self._own_modules():
            names |= {f"{prefix}.{name}" for name, p in module.named_parameters(recurse=False) if prefix and p.ndim < 2}
        return names

    def init_weights(self) -> None:
        """Load every Pretrained entry of ``init_cfg``, strictly; the trunk's own are loaded before.

        Raises:
            ConfigError, CheckpointError: As for ``BaseBackbone.init_weights``.
        """
        pretrained, others = split_init_cfg(self.init_cfg)
        if self.is_init or not pretrained:
            super().init_weights()
            return
        if others:
            raise ConfigError(
                f"ViTAdapter: init_cfg has {len(others)} entries besides Pretrained, expected weights alone. Remove "
                "them, or give them to backbone."
            )
        for entry in pretrained:
            state = read_weights(entry["checkpoint"], entry.get("prefix"), entry.get("map_location", "cpu"))
            match = check(self, state, source=repr(entry["checkpoint"]), advice="Check backbone.arch and prefix.")
            load(self, match)
            print_log(match.line(), logger="current")
        self.backbone._is_init = True
        self._is_init = True


def check_trunk(trunk: object) -> None:
    """Raise ``ConfigError`` unless ``trunk`` can be the trunk of an adapter."""
    if not isinstance(trunk, ColumnarBackbone):
        raise ConfigError(
            f"ViTAdapter: backbone is a {type(trunk).__name__}, expected a columnar backbone of mmvmamba (one width, "
            "one stride), such as PlainMamba. Backbones with stages need no adapter."
        )
    if trunk.stem_stride != _TRUNK_STRIDE:
        raise ConfigError(
            f"ViTAdapter: backbone has stride {trunk.stem_stride}, expected {_TRUNK_STRIDE}, that of the third map. "
            "Choose another patch size."
        )
    if trunk.cls_token is not None:
        raise ConfigError(
            f"ViTAdapter: backbone has {trunk.cls_token.shape[1]} class tokens, expected none: every token has a place "
            "on the map. Build it with cls_token='none'."
        )


def check_interactions(indexes: Sequence[Sequence[int]] | None, depth: int) -> tuple[tuple[int, int], ...]:
    """Return the first and last layer of every interaction, or raise ``ConfigError``.

    Args:
        indexes: See ``ViTAdapter``.
        depth: Layers of the trunk.
    """
    if indexes is None:
        if depth % len(STRIDES):
            raise ConfigError(
                f"interaction_indexes is None for a trunk of {depth} layers, expected a multiple of {len(STRIDES)} to "
                "be cut into equal parts. Name the first and last layer of every part."
            )
        part = depth // len(STRIDES)
        return tuple((i * part, (i + 1) * part - 1) for i in range(len(STRIDES)))
    pairs = [tuple(pair) if isinstance(pair, Sequence) else () for pair in indexes]
    flat = [layer for pair in pairs for layer in pair]
    whole = all(isinstance(layer, int) and not isinstance(layer, bool) and 0 <= layer < depth for layer in flat)
    rising = whole and all(
        pair[0] <= pair[1] and (i == 0 or pairs[i - 1][1] < pair[0]) for i, pair in enumerate(pairs) if len(pair) == 2
    )
    if not pairs or any(len(pair) != 2 for pair in pairs) or not rising:
        raise ConfigError(
            f"interaction_indexes is {indexes!r}, expected pairs (first layer, last layer) in rising order, of layers "
            f"0 to {depth - 1}. Correct it."
        )
    return tuple((first, last) for first, last in pairs)


def _highest_drop_path(trunk: nn.Module) -> float:
    """Return the stochastic depth of the last layer, which is the highest."""
    return max((module.rate for module in trunk.modules() if isinstance(module, DropPath)), default=0.0)


def _resize(x: Tensor, like: Tensor) -> Tensor:
    """Return the map ``x`` (b, h, w, d) in rows and columns of ``like`` (b, h', w', d), bilinearly."""
    if x.shape[1:3] == like.shape[1:3]:
        return x
    resized = F.interpolate(x.permute(0, 3, 1, 2), size=like.shape[1:3], mode="bilinear", align_corners=False)
    return resized.permute(0, 2, 3, 1)
