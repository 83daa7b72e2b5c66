"""Parameters and multiply-adds of a classifier, detector or segmentor, counted without computing anything.

The model runs on PyTorch's meta device, which knows shapes and no values: seconds and no memory for any size of image.

Convention, that of published tables (fvcore's and ``mmengine.analysis``'s): a multiply-add of a convolution or matrix
product counts 1 (`torch.utils.flop_counter` would say 2), a norm 5 per entry, a batch norm in evaluation 2, a bilinear
upsampling 4, a pooling 1; activations, sums and products per entry count nothing. A selective scan counts
9 b l d n + b d l, with d channels over all routes, as the authors of Mamba advise
(https://github.com/state-spaces/mamba/issues/110); its step sizes are a product like any other. `mmvmamba.ops.flops`
counts the same scans for PyTorch's counter, by another convention.

A two-stage detector is counted with a fixed number of proposals: random weights would find another number each time.
Its mask heads see 100 of them, as in mmdet's own count of Mask R-CNN. Not counted are RoIAlign, NMS and the auxiliary
head of a segmentor, which only a training uses.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import mmvmamba.ops  # noqa: F401  (registers the operators that are counted)
from mmvmamba.errors import ConfigError
from mmvmamba.ops.library import TWINS, twin

PROPOSALS = 1000
"""Proposals of a two-stage detector, as its test settings have it."""
MASKS = 100
"""How many of them a mask head sees."""

_NORM, _BATCH_NORM, _BILINEAR = 5, 2, 4

Formula = Callable[..., int]
"""From the arguments of an operator, and its result as ``out``, to its count."""


@dataclasses.dataclass(frozen=True)
class ModelCost:
    """What a model costs.

    Attributes:
        parameters: Number of parameters of the whole model, with the heads that only a training uses.
        flops: Multiply-adds of one image, in the convention of this module.
        by_part: The same by part of the model, such as ``"backbone"`` or ``"roi_head.bbox_head"``.
        by_operator: The same by operator.
        uncounted: Operators without a formula here, free in this convention, and how often they were called.
    """

    parameters: int
    flops: int
    by_part: Mapping[str, int]
    by_operator: Mapping[str, int]
    uncounted: Mapping[str, int]


def count_model(cfg: Config, height: int, width: int, *, proposals: int = PROPOSALS) -> ModelCost:
    """Count one image of ``height`` x ``width`` through the model of a config.

    Args:
        cfg: With ``model`` and ``default_scope``; the weights do not matter and are not read.
        height: Rows.
        width: Columns.
        proposals: How many boxes the second stage of a detector gets.

    Raises:
        ConfigError: If a number is less than 1, the config has no model, or the model needs values and not only shapes.
    """
    for name, value in (("height", height), ("width", width), ("proposals", proposals)):
        if value < 1:
            raise ConfigError(f"{name} is {value!r}, expected at least 1. Correct it.")
    if cfg.get("model") is None:
        raise ConfigError("model is missing in the config, expected one to count. Give the config of a whole model.")
    model = _build(cfg).eval()
    _replace_what_needs_values(model, proposals)
    image = torch.empty(1, 3, height, width, device="meta")
    try:
        return _count(model, image, _data_samples(cfg, height, width), mode="tensor")
    except (NotImplementedError, RuntimeError, TypeError) as error:
        raise ConfigError(
            f"the model {cfg.model.type} cannot be counted: it needs values where only shapes are known "
            f"({' '.join(str(error).split())[:300]}). Count it with mmengine.analysis.get_model_complexity_info."
        ) from error


def count_backbone(model: nn.Module, height: int, width: int) -> ModelCost:
    """Count one image of ``height`` x ``width`` through a module that takes nothing else.

    Args:
        model: A backbone of 3 input channels; it is copied, and stays as it is.
        height: Rows.
        width: Columns.
    """
    # What stands in for the tensors has no values: nothing large is copied.
    stand_ins = {id(tensor): _without_values(tensor) for tensor in (*model.parameters(), *model.buffers())}
    copied = copy.deepcopy(model, stand_ins)
    copied.train(False)
    return _count(copied, torch.empty(1, 3, height, width, device="meta"))


def _without_values(tensor: Tensor) -> Tensor:
    shape = torch.empty_like(tensor, device="meta")
    return nn.Parameter(shape, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else shape


def _count(model: nn.Module, *inputs: Any, **options: Any) -> ModelCost:
    counter = _Counter(model)
    with torch.no_grad(), counter:
        model(*inputs, **options)
    return ModelCost(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        flops=sum(counter.by_part.values()),
        by_part=dict(counter.by_part),
        by_operator=dict(counter.by_operator),
        uncounted=dict(counter.uncounted),
    )


def _build(cfg: Config) -> nn.Module:
    """Build the model of a config as its library does and take its values away.

    Built on the meta device it would be faster, but many constructors read values (drop path rates, anchors).
    """
    from mmengine.registry import MODELS

    init_default_scope(cfg.default_scope)
    model: nn.Module = MODELS.build(cfg.model)
    return model.to("meta")


def _data_samples(cfg: Config, height: int, width: int) -> list[Any] | None:
    """Return what a detector wants to know of its images; the others ask for nothing."""
    if cfg.default_scope != "mmdet":
        return None
    from mmdet.structures import DetDataSample

    shape = (height, width)
    info = dict(img_shape=shape, ori_shape=shape, pad_shape=shape, batch_input_shape=shape, scale_factor=(1.0, 1.0))
    return [DetDataSample(metainfo=dict(info, flip=False, flip_direction=None))]


def _replace_what_needs_values(model: nn.Module, proposals: int) -> None:
    """Let a detector's first stage give boxes without values, and its second stage take features of them."""
    if hasattr(model, "rpn_head"):
        from mmengine.structures import InstanceData

        boxes = InstanceData(bboxes=torch.empty(proposals, 4, device="meta"))
        model.rpn_head.predict_by_feat = lambda *_scores, **_options: [boxes]  # type: ignore[union-attr]
    for module in model.modules():
        if hasattr(module, "roi_layers"):
            module.forward = _features_without_values(module)
        if hasattr(module, "_mask_forward") and hasattr(module, "num_stages"):
            module._mask_forward = _fewer_masks(module._mask_forward)  # type: ignore[assignment]  # not a submodule


def _fewer_masks(mask_forward: Any) -> Callable[..., Any]:
    """Let the mask heads of a cascade see ``MASKS`` boxes; mmdet's own ``forward`` does so in Mask R-CNN only."""

    def forward(stage: int, features: tuple[Tensor, ...], boxes: Tensor) -> Any:
        results = mask_forward(stage, features, boxes[:MASKS])
        masks = results["mask_preds"]
        return dict(results, mask_preds=masks.new_empty(boxes.shape[0], *masks.shape[1:]))

    return forward


def _features_without_values(extractor: nn.Module) -> Callable[..., Tensor]:
    """Return what replaces the ``forward`` of mmdet's RoI extractors."""
    layers: Any = extractor.roi_layers
    channels: Any = extractor.out_channels
    size = layers[0].output_size

    def forward(features: tuple[Tensor, ...], boxes: Tensor, _scale: float | None = None) -> Tensor:
        return features[0].new_empty(boxes.shape[0], channels, *size)

    return forward


class _Counter(TorchDispatchMode):
    """Counts every operator that PyTorch's dispatcher sees, by part of a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.by_part: Counter[str] = Counter()
        self.by_operator: Counter[str] = Counter()
        self.uncounted: Counter[str] = Counter()
        self._parts: list[str] = []
        for name, module in model.named_modules():
            if name:
                module.register_forward_pre_hook(lambda _module, _inputs, name=name: self._parts.append(name))
                module.register_forward_hook(lambda *_call: self._parts.pop() and None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and count it."""
        out = func(*args, **(kwargs or {}))
        formula = FORMULAS.get(func.overloadpacket)
        if formula is None:
            self.uncounted[str(func.overloadpacket)] += 1
        else:
            count = formula(*args, **(kwargs or {}), out=out)
            # Heads are often called past forward(), so the outermost module that was entered says which part it is.
            self.by_part[self._parts[0] if self._parts else "(outside)"] += count
            self.by_operator[str(func.overloadpacket)] += count
        return out


def _product(a: Tensor, b: Tensor, *_rest: Any, out: Tensor, **_options: Any) -> int:  # noqa: ARG001
    return out.numel() * a.shape[-1]


def _product_added(_bias: Tensor, a: Tensor, b: Tensor, *_rest: Any, out: Tensor, **_options: Any) -> int:  # noqa: ARG001
    return out.numel() * a.shape[-1]


def _convolution(x: Tensor, weight: Tensor, *rest: Any, out: Tensor, **_options: Any) -> int:
    transposed = rest[4]  # bias, stride, padding, dilation, transposed
    return (x if transposed else out).numel() * math.prod(weight.shape[1:])


def _layer_norm(x: Tensor, *_rest: Any, out: Any, **_options: Any) -> int:  # noqa: ARG001
    return _NORM * x.numel()


def _batch_norm(x: Tensor, *_rest: Any, out: Any, **_options: Any) -> int:  # noqa: ARG001
    return _BATCH_NORM * x.numel()


def _bilinear(_x: Tensor, *_rest: Any, out: Tensor, **_options: Any) -> int:
    return _BILINEAR * out.numel()


def _per_result(_x: Tensor, *_rest: Any, out: Tensor, **_options: Any) -> int:
    return out.numel()


def _per_entry(x: Tensor, *_rest: Any, out: Tensor, **_options: Any) -> int:  # noqa: ARG001
    return x.numel()


def scan_count(positions: int, d_state: int) -> int:
    """Return the count of a selective scan over ``positions``, which is entries times routes, channels and length."""
    return positions * (9 * d_state + 1)


def _selective_scan(u: Tensor, _delta: Tensor, A: Tensor, *_rest: Any, **_options: Any) -> int:
    return scan_count(u.numel(), A.shape[1])


def _scan2d(
    x: Tensor, _projections: Tensor, dt_weight: Tensor, _bias: Tensor | None, A: Tensor, _skip: Tensor | None,
    _orders: list[int], permutation: Tensor | None, *_rest: Any, **_options: Any,
) -> int:  # fmt: skip
    b, h, w = x.shape[:3]  # one map, or one for each route
    k, d, rank = dt_weight.shape
    positions = b * k * d * (h * w if permutation is None else permutation.shape[1])
    return scan_count(positions, A.shape[2]) + positions * rank


_aten = torch.ops.aten
FORMULAS: dict[Any, Formula] = {
    _aten.mm: _product,
    _aten.bmm: _product,
    _aten.addmm: _product_added,
    _aten.baddbmm: _product_added,
    _aten.convolution: _convolution,
    _aten.native_layer_norm: _layer_norm,
    _aten.native_group_norm: _layer_norm,
    _aten.native_batch_norm: _batch_norm,
    _aten._native_batch_norm_legit_no_training: _batch_norm,
    _aten.upsample_bilinear2d: _bilinear,
    _aten.upsample_nearest2d: _per_result,
    _aten._adaptive_avg_pool2d: _per_entry,
    _aten.mean: _per_entry,  # what pooling to one pixel comes down to
    **{getattr(torch.ops.mmvmamba, twin("selective_scan", suffix)): _selective_scan for suffix in TWINS},
    **{getattr(torch.ops.mmvmamba, twin("scan2d", suffix)): _scan2d for suffix in TWINS},
}
"""Operator to formula; backward operators are not here, for nothing is differentiated."""
