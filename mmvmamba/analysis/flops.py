"""Parameters and multiply-adds of a classifier, detector or segmentor, counted without computing anything.

The model runs on PyTorch's meta device, which knows shapes and no values: seconds and no memory for any size of image.

Convention, that of published tables (fvcore's and ``mmengine.analysis``'s): a multiply-add of a convolution or matrix
product counts 1 (`torch.utils.flop_counter` would say 2), a norm 5 per entry, a batch norm in evaluation 2, a bilinear
upsampling 4, a pooling 1; activations, sums and products per entry count nothing. A selective scan counts
9 b l d n + b d l, with d channels over all routes, as the authors of Mamba advise
(https://github.com/state-spaces/mamba/issues/110); its step sizes are a product like any other. `mmvmamba.ops.flops`
counts the same scans for PyTorch's counter, by another convention, which `mmvmamba.analysis.flop_passes` applies to
whole models, with their backward. A deformable aggregation counts 36 per channel and pixel, which is four corners of
nine points and what HRVMamba's published numbers come to.

A two-stage detector is counted with a fixed number of proposals: random weights would find another number each time.
Its mask heads see 100 of them, as in mmdet's own count of Mask R-CNN. Not counted are RoIAlign, NMS and the auxiliary
head of a segmentor, which only a training uses.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mmvmamba.ops  # noqa: F401  (registers the operators that are counted)
from mmvmamba.errors import ConfigError
from mmvmamba.ops.library import TWINS, twin

PROPOSALS = 1000
"""Proposals of a two-stage detector, as its test settings have it."""
MASKS = 100
"""How many of them a mask head sees."""

OUTSIDE = "(outside)"
"""The part of what runs in no module."""

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
        by_row: The same by part, and for the backbone by child, such as ``"backbone.layers.0"`` (see `table_rows`).
        by_operator: The same by operator.
        uncounted: Operators without a formula here, free in this convention, and how often they were called.
    """

    parameters: int
    flops: int
    by_part: Mapping[str, int]
    by_row: Mapping[str, int]
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
    model, inputs, _ = model_without_values(cfg, height, width, proposals)
    with said_where_values_are_needed(cfg):
        return _count(model, *inputs, mode="tensor")


def model_without_values(
    cfg: Config, height: int, width: int, proposals: int
) -> tuple[nn.Module, tuple[Any, ...], list[Tensor]]:
    """Return a model that computes shapes only, what its ``forward`` takes, and a list for outputs it does not return.

    The list receives what a detector's first stage and the mask heads of a cascade give when the model runs: boxes and
    detached masks are made of it, which are no function of it here.

    Args:
        cfg: With ``model`` and ``default_scope``.
        height: Rows of the image.
        width: Columns.
        proposals: How many boxes the second stage of a detector gets.

    Raises:
        ConfigError: If a number is less than 1, or the config has no model.
    """
    for name, value in (("height", height), ("width", width), ("proposals", proposals)):
        if value < 1:
            raise ConfigError(f"{name} is {value!r}, expected at least 1. Correct it.")
    if cfg.get("model") is None:
        raise ConfigError("model is missing in the config, expected one to count. Give the config of a whole model.")
    model = _build(cfg).eval()
    unreturned: list[Tensor] = []
    _replace_what_needs_values(model, proposals, unreturned)
    image = torch.empty(1, 3, height, width, device="meta")
    return model, (image, _data_samples(cfg, height, width)), unreturned


@contextlib.contextmanager
def said_where_values_are_needed(cfg: Config) -> Iterator[None]:
    """Turn the errors of a model that reads values into a ConfigError."""
    try:
        yield
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
    return _count(copy_without_values(model), torch.empty(1, 3, height, width, device="meta"))


def copy_without_values(model: nn.Module) -> nn.Module:
    """Return a copy of a module in evaluation form that has shapes only; nothing large is copied."""
    stand_ins = {id(tensor): _without_values(tensor) for tensor in (*model.parameters(), *model.buffers())}
    copied = copy.deepcopy(model, stand_ins)
    copied.train(False)  # of mmpretrain's backbones, it returns None
    return copied


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
        by_row=dict(counter.by_row),
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


def _replace_what_needs_values(model: nn.Module, proposals: int, unreturned: list[Tensor]) -> None:
    """Let a detector's first stage give boxes without values, and its second stage take features of them."""
    if hasattr(model, "rpn_head"):
        from mmengine.structures import InstanceData

        boxes = InstanceData(bboxes=torch.empty(proposals, 4, device="meta"))

        def predict_by_feat(*maps: Any, **_options: Any) -> list[Any]:
            unreturned.extend(leaf for leaf in tree_leaves(maps) if isinstance(leaf, Tensor))
            return [boxes]

        model.rpn_head.predict_by_feat = predict_by_feat  # type: ignore[union-attr]
    for module in model.modules():
        if hasattr(module, "roi_layers"):
            module.forward = _features_without_values(module)
        if hasattr(module, "_mask_forward") and hasattr(module, "num_stages"):
            module._mask_forward = _fewer_masks(module._mask_forward, unreturned)  # type: ignore[assignment]  # not a submodule


def _fewer_masks(mask_forward: Any, unreturned: list[Tensor]) -> Callable[..., Any]:
    """Let the mask heads of a cascade see ``MASKS`` boxes; mmdet's own ``forward`` does so in Mask R-CNN only."""

    def forward(stage: int, features: tuple[Tensor, ...], boxes: Tensor) -> Any:
        results = mask_forward(stage, features, boxes[:MASKS])
        masks = results["mask_preds"]
        unreturned.append(masks)
        return dict(results, mask_preds=masks.new_empty(boxes.shape[0], *masks.shape[1:]))

    return forward


def _features_without_values(extractor: nn.Module) -> Callable[..., Tensor]:
    """Return what replaces the ``forward`` of mmdet's RoI extractors."""
    layers: Any = extractor.roi_layers
    channels: Any = extractor.out_channels
    size = layers[0].output_size

    def forward(features: tuple[Tensor, ...], boxes: Tensor, _scale: float | None = None) -> Tensor:
        pooled = features[0].new_empty(boxes.shape[0], channels, *size)
        for feature in features[: len(layers)]:  # for the gradient; no convention counts sums
            pooled = pooled + feature.sum()
        return pooled

    return forward


def table_rows(model: nn.Module) -> list[str]:
    """Return the names of the modules that get a row of their own in a table: the children of the backbone.

    Of a child that is a list of modules, such as the stages of most backbones, every entry gets one. A model without a
    ``backbone`` is one.
    """
    backbone = getattr(model, "backbone", None)
    prefix = "" if backbone is None else "backbone."
    children: Any = (model if backbone is None else backbone).named_children()
    names = []
    for name, child in children:
        entries = [f"{name}.{index}" for index in range(len(child))] if isinstance(child, nn.ModuleList) else [name]
        names += [prefix + entry for entry in entries]
    return names


class Place:
    """Where a running model is: it follows the modules that are entered and left.

    Args:
        model: Gets hooks, for good.
        moved: Called whenever a module was entered or left.
    """

    def __init__(self, model: nn.Module, moved: Callable[[], None] = lambda: None) -> None:
        self._entered: list[tuple[str, str | None]] = []
        self._moved = moved
        rows = table_rows(model)
        for name, module in model.named_modules():
            if name:
                row = next((row for row in rows if f"{name}.".startswith(f"{row}.")), None)
                module.register_forward_pre_hook(lambda _module, _inputs, at=(name, row): self._enter(at))
                module.register_forward_hook(lambda *_call: self._leave())

    def _enter(self, at: tuple[str, str | None]) -> None:
        self._entered.append(at)
        self._moved()

    def _leave(self) -> None:
        self._entered.pop()
        self._moved()

    @property
    def part(self) -> str:
        """The part of the model: heads are often called past forward(), so it is the outermost module entered."""
        return self._entered[0][0] if self._entered else OUTSIDE

    @property
    def row(self) -> str:
        """The row of a table that the modules entered belong to, or else the part."""
        return next((row for _, row in self._entered if row is not None), self.part)


class _Counter(TorchDispatchMode):
    """Counts every operator that PyTorch's dispatcher sees, by part of a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.by_part: Counter[str] = Counter()
        self.by_row: Counter[str] = Counter()
        self.by_operator: Counter[str] = Counter()
        self.uncounted: Counter[str] = Counter()
        self._place = Place(model)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and count it."""
        out = func(*args, **(kwargs or {}))
        formula = FORMULAS.get(func.overloadpacket)
        if formula is None:
            self.uncounted[str(func.overloadpacket)] += 1
        else:
            count = formula(*args, **(kwargs or {}), out=out)
            self.by_part[self._place.part] += count
            self.by_row[self._place.row] += count
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


def _weighted_bags(table: Tensor, rows: Tensor, *_rest: Any, out: Any, **_options: Any) -> int:  # noqa: ARG001
    return rows.numel() * table.shape[1]


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


def _causal_conv1d(x: Tensor, weight: Tensor, *_rest: Any, **_options: Any) -> int:
    return x.shape[0] * x.shape[1] * weight.numel()


def _depthwise_conv2d(x: Tensor, weight: Tensor, *_rest: Any, **_options: Any) -> int:
    return x.shape[:3].numel() * weight.numel()


def _ssd_state(x: Tensor, _weight: Tensor | None, b_in: Tensor, *_rest: Any, **_options: Any) -> int:
    return x.numel() * b_in.shape[3]


def _ssd_read(_state: Tensor, c_out: Tensor, *_rest: Any, out: Tensor, **_options: Any) -> int:
    return out.numel() * c_out.shape[3]


def _ssd_non_causal(x: Tensor, _weight: Tensor | None, b_in: Tensor, *_rest: Any, **_options: Any) -> int:
    return 2 * x.numel() * b_in.shape[3]


def _ssd(x: Tensor, _dt: Tensor, _decay: Tensor, b_in: Tensor, *_rest: Any, **_options: Any) -> int:
    return 3 * x.numel() * b_in.shape[3]  # B x, decay h and C h


_aten = torch.ops.aten
_mmvmamba = torch.ops.mmvmamba
_OURS: dict[str, Formula] = {
    "selective_scan": _selective_scan,
    "scan2d": _scan2d,
    "ssd_state": _ssd_state,
    "ssd_read": _ssd_read,
    "ssd_non_causal": _ssd_non_causal,
    "ssd": _ssd,
}
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
    _aten._embedding_bag: _weighted_bags,
    _aten._embedding_bag_forward_only: _weighted_bags,
    _mmvmamba.causal_conv1d: _causal_conv1d,
    _mmvmamba.depthwise_conv2d: _depthwise_conv2d,
    **{getattr(_mmvmamba, twin(name, suffix)): formula for name, formula in _OURS.items() for suffix in TWINS},
}
"""Operator to formula; backward operators are not here, for nothing is differentiated."""
