"""What is counted as memory of a test, by hand."""

from __future__ import annotations

import pytest

pytest.importorskip("mmengine")

import torch
from torch import nn

from benchmarks.slide_memory import LiveBytes, peak_bytes


def test_tensors_count_from_their_making_to_their_end():
    x = torch.empty(100, device="meta")
    with LiveBytes() as live:
        y = x + 1
        view = y.view(10, 10)
        assert live.now == 400  # a view has nothing of its own
        del y
        assert live.now == 400
        z = view * 2
        del view
        assert live.now == 400
        z.add_(1)
        assert (live.now, live.peak) == (400, 800)


class TwoCopies(nn.Module):
    """As mmseg does it: the sum of the windows, and the same divided by how many there are."""

    def inference(self, inputs, infos):
        total = inputs.new_zeros(1, 5, *infos[0]["img_shape"])
        for _ in range(3):
            total += inputs.new_ones(1, 5, 1, 1)
        assert (total == 0).sum() == 0
        return total / 3


def test_peak_of_a_test():
    """Two tensors of 5 floats per pixel, and nothing of the first test in the second."""
    model = TwoCopies()
    for side in (64, 32):
        assert peak_bytes(model, side) == pytest.approx(2 * 5 * 4 * side**2, rel=0.01)
