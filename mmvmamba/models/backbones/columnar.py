"""What every columnar backbone needs: one width and one resolution from the first layer to the last, like a ViT.

Token sequences, class tokens, position embeddings on any grid, the layer-wise shuffle, and outputs. The families Vim,
ShuffleMamba and PlainMamba are in files of their own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils.checkpoint import checkpoint

from mmvmamba.errors import ConfigError
from mmvmamba.models.backbones.base import BaseBackbone, Block
from mmvmamba.models.layers import ChannelsLastConv2d, check_choice
from mmvmamba.models.layers.patch import image_to_channels_last
from mmvmamba.models.layers.shuffle import LayerShuffle, in_order
from mmvmamba.models.layers.tokens import (
    TokenLayout,
    insert_tokens,
    only_extra,
    only_patches,
    resize_position_embedding,
    square_grid,
)

ClassToken = Literal["none", "first", "middle"]
CLASS_TOKENS: tuple[str, ...] = get_args(ClassToken)
OutType = Literal["featmap", "cls_token", "avg_featmap"]
OUT_TYPES: tuple[str, ...] = get_args(OutType)


class ColumnarBlock(Block):
    """One layer of a columnar backbone: between layers there are tokens ``h`` and, in some families, a residual ``r``.

    ``enter`` makes what the layer works on from the two; ``forward`` makes the next ``h`` of it, and it is itself the
    next ``r``. A family with a single stream overrides ``forward`` only and adds there.
    """

    def enter(self, h: Tensor, r: Tensor | None) -> Tensor:  # noqa: ARG002 (families with two streams need both)
        """Return the layer's input (b, l, d) from the tokens ``h`` (b, l, d) and the residual ``r``, None at first."""
        return h

    def forward(self, x: Tensor, layout: TokenLayout) -> Tensor:
        """Map ``x`` (b, l, d) to the next ``h`` (b, l, d)."""
        raise NotImplementedError


class PatchEmbed(nn.Module):
    """One convolution from patches to tokens: kernel ``patch_size``, any stride, no padding, no norm.

    The output has floor((n - patch_size) / stride) + 1 tokens a side; smaller images are zero-padded to one patch.

    Args:
        in_channels: Channels of the image.
        channels: Channels of the tokens.
        patch_size: Side of a patch.
        stride: Pixels from one patch to the next.
    """

    def __init__(self, in_channels: int, channels: int, patch_size: int = 16, stride: int = 16) -> None:
        super().__init__()
        self.proj = ChannelsLastConv2d(in_channels, channels, patch_size, stride=stride)
        nn.init.normal_(self.proj.weight, std=(in_channels * patch_size**2) ** -0.5)
        nn.init.zeros_(cast("Tensor", self.proj.bias))

    def forward(self, image: Tensor) -> Tensor:
        """Map an image (b, c, h, w) to tokens (b, h', w', d)."""
        out: Tensor = self.proj(image_to_channels_last(image))
        return out

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return rows and columns of the tokens of an image of ``size`` (h, w)."""
        kernel, stride = self.proj.kernel_size[0], self.proj.stride[0]
        rows, columns = (max(side - kernel, 0) // stride + 1 for side in size)
        return rows, columns


class ColumnarBackbone(BaseBackbone):
    """Bookkeeping shared by the columnar backbones.

    Every layer is a stage: ``out_indices`` and ``frozen_stages`` count layers, all maps have the same channels and the
    same stride. A subclass builds ``self.patch_embed``, then calls ``add_tokens``, sets ``self.layers`` to
    `ColumnarBlock`s and calls ``freeze``; ``arch`` has the fields ``dim`` and ``depth``. It overrides ``feature``
    where an output is something else than ``h``, ``turn`` for what happens to tokens between layers, and
    ``token_positions`` and ``embed`` for other tokens than one class token.

    Args:
        in_channels: Channels of the image.
        stride: Pixels of the image per token, along a side.
        out_indices: Layers whose output is returned, counted from 0, in rising order; None for the last layer of each
            quarter, or for the last layer alone if ``out_type`` is not ``"featmap"``.
        out_type: ``"featmap"`` for maps (b, d, h, w), contiguous; ``"cls_token"`` for the class token (b, d);
            ``"avg_featmap"`` for the mean of the patches (b, d).
        cls_token: Where the class token stands: ``"first"``, in the ``"middle"`` (behind half of the patches, rounded
            down), or ``"none"``.
        shuffle_rate: Probability with which the last layer of a training step sees its tokens shuffled, rising
            linearly from 0 in the first; see ``layers/shuffle.py``. It breaks a graph of ``torch.compile`` in training.
        frozen_stages: -1 trains everything, 0 freezes the stem, i freezes the stem and the first i layers.
        norm_eval, with_cp, init_cfg: See ``BaseBackbone``.

    Raises:
        ConfigError: If an option is impossible or contradicts another.
    """

    stem_names: tuple[str, ...] = ("patch_embed", "pos_embed", "cls_token")
    #: Where the class token of a checkpoint stands whose model here has none; names and shapes do not tell.
    stored_cls_token: ClassToken = "first"  # noqa: S105 (no password)
    #: What ``out_type`` may be.
    out_types: tuple[str, ...] = OUT_TYPES

    pos_embed: nn.Parameter | None
    cls_token: nn.Parameter | None

    def __init__(
        self,
        *,
        in_channels: int,
        stride: int,
        out_indices: Sequence[int] | None,
        out_type: str,
        cls_token: str,
        shuffle_rate: float,
        frozen_stages: int,
        norm_eval: bool,
        with_cp: bool,
        init_cfg: dict | list[dict] | None,
    ) -> None:
        depth = self.arch.depth
        check_choice("out_type", out_type, self.out_types)
        check_choice("cls_token", cls_token, CLASS_TOKENS)
        if out_type == "cls_token" and cls_token == "none":  # noqa: S105
            raise ConfigError(
                "out_type is 'cls_token' but cls_token is 'none', expected a class token to return. Choose "
                "cls_token='first' or 'middle', or another out_type."
            )
        if out_indices is None:
            out_indices = quarters(depth) if out_type == "featmap" else (depth - 1,)
        super().__init__(in_channels, (1,) * depth, out_indices, frozen_stages, norm_eval, with_cp, init_cfg)
        self.stem_stride = stride
        self.out_type = out_type
        self.cls_token_place = cls_token
        self.shuffle = LayerShuffle(shuffle_rate, depth)

    # ------------------------------------------------------------ what others ask for

    @property
    def stage_channels(self) -> tuple[int, ...]:
        """Channels of every layer's map, which are all the same."""
        return (self.arch.dim,) * len(self.depths)

    @property
    def stage_strides(self) -> tuple[int, ...]:
        """Pixels of the image per cell of every layer's map, along a side, which are all the same."""
        return (self.stem_stride,) * len(self.depths)

    def parts_of_stage(self, stage: int) -> list[nn.Module]:
        """Return what ``frozen_stages > stage`` freezes besides the stem and earlier layers."""
        return [self.layers[stage]]

    def unused_parts(self) -> list[nn.Module]:
        """Return what no output depends on: the layers after the last output."""
        return list(self.layers[self.out_indices[-1] + 1 :])

    def get_layer_depth(self, param_name: str, prefix: str = "") -> tuple[int, int]:
        """Return the depth of a parameter and the number of depths, for layer-wise learning rate decay.

        The stem (patches, position embedding, class token) has depth 0, layer i depth i + 1, everything else (norms
        behind the layers, heads, and names outside ``prefix``) the last.
        """
        num_depths = len(self.depths) + 2
        parts = param_name.removeprefix(prefix).split(".") if param_name.startswith(prefix) else [""]
        if parts[0] in self.stem_names:
            return 0, num_depths
        return int(parts[1]) + 1 if parts[0] == "layers" else num_depths - 1, num_depths

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters that are trained without weight decay.

        Those with one dimension (norms, biases), position embeddings and class tokens, and what the layers name
        themselves.
        """
        own = {name for name, p in self.named_parameters() if p.ndim <= 1 or name in self.stem_names}
        return super().no_weight_decay() | own

    # ------------------------------------------------------------ tokens

    def add_tokens(self, grid: tuple[int, int]) -> None:
        """Register the class token, if there is one, and the position embedding for a ``grid`` (rows, columns).

        Both start truncated normal with standard deviation 0.02. The embedding has a row for the class token, too, at
        its place in the sequence.
        """
        self.pos_grid = grid
        extra = self.token_positions(grid)
        self.cls_token = nn.Parameter(torch.zeros(1, len(extra), self.arch.dim)) if extra else None
        self.pos_embed = nn.Parameter(torch.empty(1, math.prod(grid) + len(extra), self.arch.dim))
        for parameter in (self.cls_token, self.pos_embed):
            if parameter is not None:
                nn.init.trunc_normal_(parameter, std=0.02)

    def token_positions(self, grid: tuple[int, int]) -> tuple[int, ...]:
        """Return the rising positions, in the sequence of a ``grid`` (rows, columns), of tokens that are no patches."""
        return class_token_positions(self.cls_token_place, math.prod(grid))

    def positions(self, layout: TokenLayout) -> Tensor:
        """Return the position embedding (1, l, d) of a sequence, resized if its grid is not that of the parameter."""
        embedding = cast("Tensor", self.pos_embed)
        grid, wanted = self.pos_grid, (layout.rows, layout.columns)
        # What an export leaves open is not looked at.
        if all(statically_known_true(own == new) for own, new in zip(grid, wanted, strict=True)):
            return embedding
        at = self.token_positions(grid)
        patches = resize_position_embedding(only_patches(embedding, at), grid, wanted)
        return insert_tokens(patches, only_extra(embedding, at), layout.extra) if at else patches

    def embed(self, image: Tensor) -> tuple[Tensor, TokenLayout]:
        """Return the tokens (b, l, d) that enter the first layer, and where they come from, for an image (b, c, h, w).

        Raises:
            OpInputError: If the image has another number of channels, an integer dtype or an empty side.
        """
        self.check_input(image)
        maps = self.patch_embed(image)
        grid = (maps.shape[1], maps.shape[2])
        layout = TokenLayout(*grid, extra=self.token_positions(grid))
        x = maps.flatten(1, 2)
        if self.cls_token is not None:
            x = insert_tokens(x, self.cls_token.expand(x.shape[0], -1, -1), layout.extra)
        return x + self.positions(layout), layout

    # ------------------------------------------------------------ layers

    def turn(self, h: Tensor, r: Tensor | None, layout: TokenLayout) -> tuple[Tensor, Tensor | None]:  # noqa: ARG002
        """Return both streams as they shall enter a layer, such as rotated by their positions; here unchanged."""
        return h, r

    def enter_layer(self, layer: int, h: Tensor, r: Tensor | None, layout: TokenLayout) -> Tensor:
        """Return the input (b, l, d) of a layer, in which the two streams are one."""
        block = cast("ColumnarBlock", self.layers[layer])
        return block.enter(*self.turn(h, r, layout))

    def run_layer(self, layer: int, x: Tensor, layout: TokenLayout, shuffle: bool = True) -> Tensor:
        """Apply a layer to what ``enter_layer`` gave (b, l, d), shuffled or recomputed in the backward pass if so set.

        The permutation is drawn before, so that a recomputation sees the same.
        """
        block = self.layers[layer]
        permutation = self.shuffle.draw(layer, x) if shuffle else None

        def run(x: Tensor) -> Tensor:
            return in_order(lambda tokens: block(tokens, layout), x, permutation)

        if self.with_cp and self.training and torch.is_grad_enabled():
            return checkpoint(run, x, use_reentrant=False)
        return run(x)

    def run_layers(
        self, h: Tensor, r: Tensor | None, layout: TokenLayout, layers: range, shuffle: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Run some layers in a row, as an adapter does between its own steps.

        Args:
            h: Tokens (b, l, d) that the layer before, or ``embed``, gave; an adapter may have changed them.
            r: The residual stream (b, l, d) beside them, None before the first layer.
            layout: What ``embed`` gave.
            layers: Numbers of the layers.
            shuffle: False runs without the layer-wise shuffle, whatever ``shuffle_rate`` is.

        Returns:
            ``h`` and ``r`` behind the last of them.
        """
        for layer in layers:
            r = self.enter_layer(layer, h, r, layout)
            h = self.run_layer(layer, r, layout, shuffle)
        return h, r

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return one output per entry of ``out_indices`` for an image (b, c, h, w): maps or vectors, see ``out_type``.

        Raises:
            OpInputError: If the image has another number of channels, an integer dtype or an empty side.
        """
        h, layout = self.embed(image)
        outs = []
        x = self.enter_layer(0, h, None, layout)
        for layer in range(self.out_indices[-1] + 1):
            h = self.run_layer(layer, x, layout)
            following = self.enter_layer(layer + 1, h, x, layout) if layer + 1 < len(self.layers) else None
            if layer in self.out_indices:
                outs.append(self.output(self.feature(layer, h, x, following), layout))
            if following is not None:
                x = following
        return tuple(outs)

    def feature(self, layer: int, h: Tensor, r: Tensor, following: Tensor | None) -> Tensor:  # noqa: ARG002
        """Return the tokens (b, l, d) that are the output of a layer; here ``h``.

        Args:
            layer: Its number.
            h: What it gave (b, l, d).
            r: What it worked on (b, l, d).
            following: What the next layer works on (b, l, d), None behind the last.
        """
        return h

    def output(self, x: Tensor, layout: TokenLayout) -> Tensor:
        """Return tokens ``x`` (b, l, d) as ``out_type`` says: (b, d, h, w), contiguous, or (b, d)."""
        if self.out_type == "cls_token":
            return x[:, layout.extra[0]]
        patches = only_patches(x, layout.extra)
        if self.out_type == "avg_featmap":
            return patches.mean(dim=1)
        return patches.unflatten(1, (layout.rows, layout.columns)).permute(0, 3, 1, 2).contiguous()

    # ------------------------------------------------------------ loading

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Fit the position embedding of a checkpoint for another grid, or with a class token, to this model."""
        self.fit_tokens(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def fit_tokens(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Change the entries of tokens in ``state_dict`` in place, where that makes them fit.

        A class token that this model does not have is left out, with its row of the position embedding
        (``stored_cls_token`` says which); rows of another square grid are resized (bicubic). Anything else stays what
        it is and does not fit.
        """
        token, key = state_dict.get(prefix + "cls_token"), prefix + "pos_embed"
        stored = state_dict.get(key)
        if not hasattr(self, "rope"):
            # Upstream's tables of one square grid; here they are computed, unless somebody has added a place for them.
            for name in ("freqs_cos", "freqs_sin"):
                state_dict.pop(f"{prefix}rope.{name}", None)
        own = self.pos_embed
        if own is None or stored is None or not stored.is_floating_point() or stored.ndim != 3 or stored.shape[0] != 1:
            return
        dropped = token is not None and self.cls_token is None and token.shape == (1, 1, own.shape[2])
        place: str = self.stored_cls_token if dropped else self.cls_token_place
        patches = stored.shape[1] - len(class_token_positions(place, 1))
        at = class_token_positions(place, patches)
        wanted = self.token_positions(self.pos_grid)
        if stored.shape[2] != own.shape[2] or (not dropped and (len(at) != len(wanted) or stored.shape == own.shape)):
            return
        grid = self.pos_grid if patches == math.prod(self.pos_grid) else square_grid(patches)
        if grid is None:
            return
        if grid != self.pos_grid:
            # A file in half precision is resized in that of the model: its type would round what lies between.
            stored = stored.to(torch.promote_types(stored.dtype, own.dtype))
        rows = resize_position_embedding(only_patches(stored, at), grid, self.pos_grid)
        state_dict[key] = rows if not wanted else insert_tokens(rows, only_extra(stored, at), wanted)
        if dropped:
            del state_dict[prefix + "cls_token"]


def class_token_positions(place: str, patches: int) -> tuple[int, ...]:
    """Return the position of the class token among so many patches, in a tuple that is empty without one."""
    return {"none": (), "first": (0,), "middle": (patches // 2,)}[place]


def quarters(depth: int) -> tuple[int, ...]:
    """Return the last layer of each quarter of the depth, each once."""
    return tuple(dict.fromkeys(math.ceil(depth * quarter / 4) - 1 for quarter in range(1, 5)))


def image_size(img_size: int | Sequence[int]) -> tuple[int, int]:
    """Return the height and width that ``img_size`` names.

    Raises:
        ConfigError: If it is neither a positive integer nor two of them.
    """
    sides = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ConfigError(
            f"img_size is {img_size!r}, expected a positive integer or (height, width). It sets the rows of the "
            "position embedding; any image size works. Correct it."
        )
    return sides[0], sides[1]


def check_positive(**fields: object) -> None:
    """Raise ``ConfigError`` unless all of these fields of an ``arch`` are positive integers."""
    for name, value in fields.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"arch: {name} is {value!r}, expected a positive integer. Correct it.")
