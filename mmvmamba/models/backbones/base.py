"""What every backbone needs and no paper is about, written once.

Output selection and norms, freezing, gradient checkpointing, input checks, loading of pretrained weights and
layer depths, and the walk over the stages. What a stem or a block does is in the family's file alone.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from mmengine.logging import print_log
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.utils.checkpoint import checkpoint

from mmvmamba.checkpoints.matching import Match, check, check_before_loading, is_twin, load, plain_names
from mmvmamba.errors import CheckpointMismatch, ConfigError, OpInputError, nearest_spelling
from mmvmamba.models.pretrained import cut, parts, read_weights, split_init_cfg

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)  # _NormBase: batch and instance norms
_OUT_NORM = re.compile(r"outnorm\d+\.")
#: What MMPretrain's ImageClassifier consists of; its neck is a pooling without weights.
_PARTS_OF_A_CLASSIFIER = {"backbone", "head"}


class Block(nn.Module):
    """What a stage repeats. FSDP shards a model block by block, layer-wise learning rates count them."""


class Stage(nn.Module):
    """The blocks of one resolution and the downsampling that follows them."""

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.downsample = downsample


class BaseBackbone(BaseModule):
    """Bookkeeping shared by all backbones.

    A subclass builds its stem and ``self.layers`` (one module per stage, with a ``blocks`` child), calls
    ``add_out_norms`` and ``freeze`` at the end of its constructor, and uses ``check_input`` and ``run_stages`` in
    ``forward``. One whose stages are no such walk says otherwise in ``parts_of_stage``, ``unused_parts``,
    ``get_layer_depth`` and, where the sizes of its maps differ, ``stage_channels`` and ``stage_strides``.

    Args:
        in_channels: Channels of the image.
        depths: Blocks of every stage; as many stages as numbers.
        out_indices: Stages whose output is returned, in rising order.
        frozen_stages: -1 trains everything, 0 freezes the stem, i freezes the stem and the first i stages.
        norm_eval: Whether batch norms keep their running statistics while training.
        with_cp: Whether blocks are recomputed in the backward pass to save memory. Batch norms inside a block
            then see every training batch twice.
        init_cfg: MMEngine's initialisation; ``dict(type='Pretrained', checkpoint=..., prefix='backbone.')``
            loads weights and raises when they do not fit; see ``read_pretrained`` for the out norms.

    Raises:
        ConfigError: If ``in_channels``, ``out_indices`` or ``frozen_stages`` is impossible.
    """

    #: Names of the stem's modules and parameters, frozen by ``frozen_stages >= 0``.
    stem_names: tuple[str, ...] = ("patch_embed",)
    #: Pixels of the image per cell of the stem's map, along a side.
    stem_stride = 4

    arch: Any
    layers: nn.ModuleList
    init_cfg: dict | list[dict] | None

    def __init__(
        self,
        in_channels: int,
        depths: Sequence[int],
        out_indices: Sequence[int],
        frozen_stages: int,
        norm_eval: bool,
        with_cp: bool,
        init_cfg: dict | list[dict] | None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        if not isinstance(in_channels, int) or in_channels < 1:
            raise ConfigError(
                f"in_channels is {in_channels!r}, expected a positive integer: the channels of the image. Choose 3 for "
                "colours."
            )
        self.in_channels = in_channels
        self.depths = tuple(depths)
        self.out_indices = check_out_indices(out_indices, len(self.depths))
        if not isinstance(frozen_stages, int) or not -1 <= frozen_stages <= len(self.depths):
            raise ConfigError(
                f"frozen_stages is {frozen_stages!r}, expected an integer from -1 (train all) to {len(self.depths)} "
                "(freeze all). Choose one of these."
            )
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.with_cp = with_cp

    @property
    def stage_channels(self) -> tuple[int, ...]:
        """Channels of every stage's map, which a neck wants as ``in_channels`` for ``out_indices``."""
        return tuple(self.arch.dims)

    @property
    def stage_strides(self) -> tuple[int, ...]:
        """Pixels of the image per cell of every stage's map, along a side."""
        return tuple(self.stem_stride * 2**stage for stage in range(len(self.depths)))

    @classmethod
    def reject_unknown(cls, unknown: Mapping[str, object]) -> None:
        """Raise ``ConfigError`` for keywords the constructor does not have, with the nearest spelling.

        Constructors collect them only for this: a key inherited from another backbone's config must not vanish.
        """
        if not unknown:
            return
        parameters = list(inspect.signature(cls.__init__).parameters.values())
        known = [p.name for p in parameters[1:] if p.kind is not inspect.Parameter.VAR_KEYWORD]
        hints = "".join(nearest_spelling(name, known) for name in unknown)
        raise ConfigError(
            f"{cls.__name__}: unknown argument {', '.join(map(repr, unknown))}, expected arguments among "
            f"{', '.join(known)}.{hints} Remove or rename it; a config that replaces another backbone needs "
            "_delete_=True in its backbone dict."
        )

    def add_out_norms(self, norms: Sequence[nn.Module]) -> None:
        """Register one norm per entry of ``out_indices`` under the name ``outnorm{i}``; without it outputs stay raw."""
        for i, norm in zip(self.out_indices, norms, strict=True):
            self.add_module(f"outnorm{i}", norm)

    def check_input(self, image: Tensor) -> None:
        """Raise ``OpInputError`` unless ``image`` is a non-empty floating (b, in_channels, h, w)."""
        found = f"backbone input has shape {tuple(image.shape)} and dtype {image.dtype}"
        if image.ndim != 4 or image.shape[1] != self.in_channels:
            raise OpInputError(
                f"{found}, expected (b, {self.in_channels}, h, w) because in_channels={self.in_channels}. "
                "Permute the input, or build the backbone with the in_channels of your data."
            )
        if not image.is_floating_point():
            raise OpInputError(
                f"{found}, expected a floating dtype. Convert and normalise the image first (the data preprocessor "
                "of an OpenMMLab model does)."
            )
        if image.shape[2] < 1 or image.shape[3] < 1:
            raise OpInputError(f"{found}, expected height and width of at least 1. Drop empty images.")

    def run_block(self, block: nn.Module, x: Tensor) -> Tensor:
        """Apply ``block`` to ``x``, recomputing it in the backward pass if ``with_cp``."""
        if self.with_cp and self.training and torch.is_grad_enabled():
            return checkpoint(block, x, use_reentrant=False)
        return block(x)

    def run_stages(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the maps (b, c_i, h_i, w_i) of ``out_indices`` from the tokens of the stem ``x`` (b, h, w, c).

        What is behind the last of them is not run.
        """
        outs = []
        for i, layer in enumerate(cast("Iterable[Stage]", self.layers)):
            for block in layer.blocks:
                x = self.run_block(block, x)
            if i in self.out_indices:
                outs.append(self.collect(i, x))
            if i == self.out_indices[-1]:
                break
            x = layer.downsample(x)
        return tuple(outs)

    def collect(self, stage: int, x: Tensor) -> Tensor:
        """Return the output (b, c, h, w), contiguous and normed, of a stage whose map ``x`` is (b, h, w, c)."""
        norm = getattr(self, f"outnorm{stage}", None)
        return (x if norm is None else norm(x)).permute(0, 3, 1, 2).contiguous()

    def parts_of_stage(self, stage: int) -> list[nn.Module]:
        """Return what ``frozen_stages > stage`` freezes besides the stem and earlier stages; here also its out norm."""
        norm = getattr(self, f"outnorm{stage}", None)
        return [self.layers[stage], *([] if norm is None else [norm])]

    def unused_parts(self) -> list[nn.Module]:
        """Return what no output depends on: here the downsampling after the last output stage, and later stages."""
        last = self.out_indices[-1]
        behind = [child for name, child in self.layers[last].named_children() if name != "blocks"]
        return [*behind, *self.layers[last + 1 :]]

    def freeze(self) -> None:
        """Turn off gradients and training mode of what ``frozen_stages`` names, and gradients of ``unused_parts``.

        Distributed training waits for the gradient of every parameter that wants one. The names of unused parts stay
        in the state dict.
        """
        for module in self.unused_parts():
            module.requires_grad_(False)
        if self.frozen_stages < 0:
            return
        frozen: list[nn.Module] = []
        for name in self.stem_names:
            part = getattr(self, name, None)
            if isinstance(part, nn.Parameter):
                part.requires_grad_(False)
            elif part is not None:
                frozen.append(part)
        for stage in range(self.frozen_stages):
            frozen += self.parts_of_stage(stage)
        for module in frozen:
            module.eval()
            module.requires_grad_(False)

    def train(self, mode: bool = True) -> BaseBackbone:
        """Set training mode, keeping frozen parts (and batch norms, if ``norm_eval``) in evaluation mode.

        Raises:
            ConfigError: If the batch norms were converted to synchronised ones, which take channels-first maps only.
        """
        super().train(mode)
        if mode:
            synced = [name for name, module in self.named_modules() if type(module).__name__ == "SyncBatchNorm"]
            if synced:
                raise ConfigError(
                    f"{type(self).__name__}: {len(synced)} norms such as {synced[0]!r} became SyncBatchNorm, "
                    "expected the channels-last batch norms they were built with. Remove sync_bn from the config, or "
                    "choose norm='layer_norm' in arch where the family has that option."
                )
            self.freeze()
            if self.norm_eval:
                for module in self.modules():
                    if isinstance(module, _BatchNorm):
                        module.eval()
        return self

    def get_layer_depth(self, param_name: str, prefix: str = "") -> tuple[int, int]:
        """Return the depth of a parameter and the number of depths, for layer-wise learning rate decay.

        The stem has depth 0, blocks count from 1, a downsampling has the depth of the last block before it, and
        everything else (out norms, heads, and names outside ``prefix``) the last depth.

        Args:
            param_name: Name of the parameter in the whole model.
            prefix: Name of the backbone in the whole model, such as ``"backbone."``.
        """
        num_depths = sum(self.depths) + 2
        parts = param_name.removeprefix(prefix).split(".") if param_name.startswith(prefix) else [""]
        if parts[0] in self.stem_names:
            return 0, num_depths
        if parts[0] != "layers":
            return num_depths - 1, num_depths
        stage = int(parts[1])
        if parts[2] == "blocks":
            return sum(self.depths[:stage]) + int(parts[3]) + 1, num_depths
        return sum(self.depths[: stage + 1]), num_depths

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters that are trained without weight decay.

        Those of every norm, whatever it is called, and what the modules inside name themselves by a method like this.
        ``SSMOptimWrapperConstructor`` asks for them.
        """
        names: set[str] = set()
        for prefix, module in self.named_modules():
            if module is self:
                continue
            if isinstance(module, _NORMS):
                own = {name for name, _ in module.named_parameters(recurse=False)}
            else:
                ask = getattr(module, "no_weight_decay", None)
                own = ask() if callable(ask) else set()
            names |= {f"{prefix}.{name}" for name in own}
        return names

    def init_weights(self) -> None:
        """Load every Pretrained entry of ``init_cfg`` strictly; all others are MMEngine's business and come first.

        Raises:
            ConfigError: If an entry has no type, or a Pretrained entry has an unknown key or no checkpoint.
            CheckpointError: If a checkpoint cannot be read, or (``CheckpointMismatch``) does not fit.
        """
        pretrained, others = split_init_cfg(self.init_cfg)
        if self.is_init or not pretrained:
            super().init_weights()
            return
        if others:
            whole, self.init_cfg = self.init_cfg, others
            try:
                super().init_weights()
            finally:
                self.init_cfg = whole
        for entry in pretrained:
            self._load_pretrained(**entry)
        self._is_init = True

    def read_pretrained(self, checkpoint: str, prefix: str | None = None, map_location: Any = "cpu") -> Match:
        """Return what this backbone takes from a checkpoint, all checked, nothing loaded yet.

        Official files and those of a classifier trained with MMPretrain need no ``prefix``; the classifier's head is
        left out by name. Of any other model that has a backbone inside, the prefix says that only this part is meant.

        Out norms are taken if there is one for each of ``out_indices``; otherwise none is, and all keep their initial
        weight 1 and bias 0: a classifier has the norm of its last stage only, which was not trained to feed a
        detector's neck.

        Raises:
            CheckpointError: If the file cannot be read.
            CheckpointMismatch: If an entry is missing, unexpected, of another shape or dtype, or NaN.
        """
        source = f"{checkpoint!r} (prefix={prefix!r})" if prefix else repr(checkpoint)
        state = read_weights(checkpoint, map_location=map_location)
        if prefix:
            state = cut(state, prefix, checkpoint)
        left_out: list[str] = []
        if not prefix and "backbone" in (found := parts(state)):
            if not set(found) <= _PARTS_OF_A_CLASSIFIER:
                raise CheckpointMismatch(
                    f"checkpoint {source} is of a whole model with the parts {found}, expected a backbone or a "
                    "classifier. Add prefix='backbone.' to init_cfg to take its backbone, or name the file in "
                    "load_from to take all."
                )
            left_out = [name for name in state if not name.startswith("backbone.")]
            state = cut(state, "backbone", checkpoint)
        state = dict(plain_names(state, self, source))
        own_norms, drop = self._out_norms(state)
        fresh = own_norms <= drop
        match = check(
            self,
            {key: value for key, value in state.items() if key not in drop},
            allow_missing=sorted(own_norms) if fresh else (),
            source=source,
            advice="Check arch, in_channels and prefix, or name a checkpoint of this variant.",
        )
        return dataclasses.replace(match, unused=(*(key for key in state if key in drop), *left_out))

    def _out_norms(self, names: Collection[str], prefix: str = "") -> tuple[set[str], set[str]]:
        """Return the names of all out norms here, and of those that nothing is taken for or from."""
        own = {prefix + key for key in self.state_dict() if _OUT_NORM.match(key)}
        fields = {key[len(prefix) :].split(".", 1)[1] for key in own}
        possible = {f"{prefix}outnorm{i}.{field}" for i in range(len(self.depths)) for field in fields}
        return own, possible - own if own <= set(names) else possible

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Refuse weights of another backbone where a model around this one is loaded with ``strict`` off.

        MMEngine's ``load_checkpoint``, and so ``init_detector`` and the inferencers, load what fits and print the rest.
        Whoever calls ``load_state_dict`` of the backbone itself, where no ``prefix`` is, says by ``strict`` what may
        be absent.

        Raises:
            CheckpointMismatch: If there are entries for this backbone, but not all, or of other shapes, or others.
        """
        if prefix and not is_twin(self):
            own_norms, drop = self._out_norms(state_dict, prefix)
            fresh = own_norms <= drop
            rest = {key: value for key, value in state_dict.items() if key not in drop}
            allowed = sorted(name[len(prefix) :] for name in own_norms) if fresh else ()
            check_before_loading(self, rest, prefix, allow_missing=allowed)
            if fresh:
                # All or none: PyTorch and MMEngine name them as missing, in their own words.
                for name in drop:
                    state_dict.pop(name, None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _load_pretrained(self, checkpoint: str, prefix: str | None = None, map_location: Any = "cpu") -> None:
        match = self.read_pretrained(checkpoint, prefix, map_location)
        load(self, match)
        print_log(match.line(), logger="current")


def check_out_indices(out_indices: Sequence[int], num_stages: int) -> tuple[int, ...]:
    """Return ``out_indices`` as a tuple of rising stage numbers, or raise ``ConfigError``."""
    valid = (
        isinstance(out_indices, Sequence)
        and len(out_indices) > 0
        and all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < num_stages for i in out_indices)
        and all(a < b for a, b in itertools.pairwise(out_indices))
    )
    if not valid:
        raise ConfigError(
            f"out_indices is {out_indices!r}, expected distinct stages from 0 to {num_stages - 1} in rising order, "
            f"such as {tuple(range(num_stages))}. Name at least one stage."
        )
    return tuple(out_indices)
