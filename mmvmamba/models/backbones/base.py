"""What every backbone needs and no paper is about, written once.

Output selection and norms, freezing, gradient checkpointing, input checks, loading of pretrained weights and
layer depths. It never runs a stage: a family file reads top to bottom without it.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Mapping, Sequence

import torch
from mmengine.logging import print_log
from mmengine.model import BaseModule
from mmengine.runner.checkpoint import CheckpointLoader
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from mmvmamba.errors import CheckpointError, CheckpointMismatch, ConfigError, OpInputError, nearest_spelling

_NAMES_SHOWN = 10


class BaseBackbone(BaseModule):
    """Bookkeeping shared by all hierarchical backbones.

    A subclass builds its stem and ``self.layers`` (one module per stage, with a ``blocks`` child), calls
    ``add_out_norms`` and ``freeze`` at the end of its constructor, and uses ``check_input``, ``run_block`` and
    ``collect`` in ``forward``.

    Args:
        in_channels: Channels of the image.
        depths: Blocks of every stage.
        out_indices: Stages whose output is returned, in rising order.
        frozen_stages: -1 trains everything, 0 freezes the stem, i freezes the stem and the first i stages.
        norm_eval: Whether batch norms keep their running statistics while training.
        with_cp: Whether blocks are recomputed in the backward pass to save memory. Batch norms inside a block
            then see every training batch twice.
        init_cfg: MMEngine's initialisation; ``dict(type='Pretrained', checkpoint=..., prefix='backbone.')``
            loads weights and raises when they do not fit.

    Raises:
        ConfigError: If ``out_indices`` or ``frozen_stages`` is impossible.
    """

    #: Names of the stem's modules and parameters, frozen by ``frozen_stages >= 0``.
    stem_names: tuple[str, ...] = ("patch_embed",)
    #: Entries of a classifier's checkpoint that a feature extractor leaves out, by name.
    classifier_prefixes: tuple[str, ...] = ("classifier.", "head.")

    layers: nn.ModuleList

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
        """Register one norm per entry of ``out_indices`` under the official name ``outnorm{i}``."""
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

    def collect(self, stage: int, x: Tensor) -> Tensor:
        """Return the normed output (b, c, h, w), contiguous, of a stage whose map ``x`` is (b, h, w, c)."""
        return self.get_submodule(f"outnorm{stage}")(x).permute(0, 3, 1, 2).contiguous()

    def freeze(self) -> None:
        """Turn off gradients and training mode of everything ``frozen_stages`` names."""
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
            frozen.append(self.layers[stage])
            if stage in self.out_indices:
                frozen.append(self.get_submodule(f"outnorm{stage}"))
        for module in frozen:
            module.eval()
            module.requires_grad_(False)

    def train(self, mode: bool = True) -> BaseBackbone:
        """Set training mode, keeping frozen parts (and batch norms, if ``norm_eval``) in evaluation mode."""
        super().train(mode)
        if mode:
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

    def init_weights(self) -> None:
        """Load ``init_cfg`` of type Pretrained strictly; every other ``init_cfg`` is MMEngine's business."""
        cfg = self.init_cfg
        if isinstance(cfg, dict) and cfg.get("type") == "Pretrained":
            self._load_pretrained(**{key: value for key, value in cfg.items() if key != "type"})
            self._is_init = True
        else:
            super().init_weights()

    def _load_pretrained(self, checkpoint: str, prefix: str | None = None, map_location: str = "cpu") -> None:
        try:
            content = CheckpointLoader.load_checkpoint(checkpoint, map_location=map_location, logger="current")
        except ModuleNotFoundError as error:
            # The official ImageNet files also pickle the training configuration, a class of the package yacs.
            raise CheckpointError(
                f"checkpoint {checkpoint!r} holds objects of the package {error.name!r}, which is not installed; "
                "expected tensors. Where it is installed, save them alone: "
                "torch.save({'model': checkpoint['model']}, FILE)."
            ) from error
        state = content.get("state_dict", content.get("model", content))
        if prefix is not None:
            dot = prefix.rstrip(".") + "."
            state = {key[len(dot) :]: value for key, value in state.items() if key.startswith(dot)}
        state = {key: value for key, value in state.items() if not key.startswith(self.classifier_prefixes)}
        own = self.state_dict()
        # An ImageNet classifier has no norms on the outputs; they then keep their initial weight 1 and bias 0.
        missing = [key for key in own if key not in state and not key.startswith("outnorm")]
        unexpected = [key for key in state if key not in own and not key.startswith("outnorm")]
        if missing or unexpected:
            raise CheckpointMismatch(
                f"checkpoint {checkpoint!r} (prefix={prefix!r}) does not fit {type(self).__name__}: "
                f"{len(missing)} of {len(own)} entries missing {missing[:_NAMES_SHOWN]}, "
                f"{len(unexpected)} unexpected {unexpected[:_NAMES_SHOWN]}. Check arch and prefix, or convert the "
                "checkpoint with mmvmamba.converters."
            )
        try:
            result = self.load_state_dict({key: value for key, value in state.items() if key in own}, strict=False)
        except RuntimeError as error:
            raise CheckpointMismatch(
                f"checkpoint {checkpoint!r} (prefix={prefix!r}) does not fit {type(self).__name__}: {error}. "
                "Check arch and in_channels."
            ) from error
        loaded = len(own) - len(result.missing_keys)
        print_log(f"{type(self).__name__}: loaded {loaded}/{len(own)} entries from {checkpoint}", logger="current")


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
