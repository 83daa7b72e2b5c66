"""Batch norm of channels-last maps over the images of all processes: a detector has two per process."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_reduce

from mmvmamba.models.layers import BatchNorm


class SynchronisedBatchNorm(BatchNorm):
    """``BatchNorm`` of (b, h, w, c) whose statistics in training are those of all processes, on any device.

    ``torch.nn.SyncBatchNorm`` takes channels-first maps on a GPU only. Where nothing is distributed, and in evaluation,
    it is ``BatchNorm``. The statistics are float32 (float64 of a double-precision map) in two passes, first the means,
    then the squares of what is left.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised ``x`` (b, h, w, c)."""
        distributed = self.training and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if not distributed:
            return super().forward(x)
        wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        count = all_reduce(wide.new_tensor(float(wide[..., 0].numel())))
        mean = all_reduce(wide.sum((0, 1, 2))) / count
        centred = wide - mean
        variance = all_reduce(centred.square().sum((0, 1, 2))) / count
        self._remember(mean.detach(), variance.detach(), float(count))
        normed = centred * torch.rsqrt(variance + self.eps) * self.weight + self.bias
        return normed.to(x.dtype)

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor, count: float) -> None:
        """Update the running statistics, the variance without bias, as ``nn.BatchNorm2d`` does."""
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum or 0.0)
        unbiased = variance * (count / max(count - 1.0, 1.0))
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum or 0.0)
