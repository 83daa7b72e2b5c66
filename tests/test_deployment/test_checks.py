"""The comparison that an export has to pass: known differences are found, sizes stay where they may be."""

import math

import pytest
import torch

from mmvmamba.deployment.checks import Run, compare, largest_error, random_images, require_equal
from mmvmamba.errors import ConfigError


def test_sizes_lie_where_a_program_is_good():
    sizes = {"height": (40, 50), "width": (33, None)}
    shapes = [tuple(image.shape) for image in random_images(sizes, (2, 3, 160, 224), 200, largest=60)]
    assert {shape[:2] for shape in shapes} == {(2, 3)}
    assert {shape[2] for shape in shapes} == set(range(40, 51))
    assert {shape[3] for shape in shapes} == set(range(33, 61))
    assert {image.shape[2] for image in random_images({"height": (500, None)}, (1, 3, 9, 9), 5, largest=60)} == {500}
    first, again = (next(iter(random_images(sizes, (1, 3, 9, 9), 1))) for _ in range(2))
    assert torch.equal(first, again)


def test_errors_by_hand():
    expected = [torch.tensor([1.0, -4.0]), torch.tensor([10.0])]
    found = [torch.tensor([1.0, -4.0]), torch.tensor([10.5])]
    assert largest_error(expected, expected) == 0
    assert largest_error(found, expected) == pytest.approx(0.05)
    assert largest_error([torch.tensor([1.5, -4.0]), expected[1]], expected) == pytest.approx(0.125)
    assert largest_error(found[:1], expected) == math.inf
    assert largest_error([torch.zeros(2, 1), expected[1]], expected) == math.inf
    assert largest_error([torch.tensor([1.0, math.nan]), expected[1]], expected) == math.inf
    assert largest_error([torch.zeros(2)], [torch.zeros(2)]) == 0
    assert largest_error([torch.ones(2)], [torch.zeros(2)]) == math.inf


def test_both_are_run_and_timed():
    calls = []

    def network(image):
        calls.append("network")
        return {"maps": (image, 2 * image)}

    def exported(image):
        calls.append("exported")
        return [image, 2 * image * 1.001]

    (run,) = compare(network, exported, [torch.ones(1, 3, 2, 2)], repeats=2)
    assert calls == ["network", "exported"] * 3  # in turn
    assert run.error == pytest.approx(0.001, rel=1e-3)
    assert run.pytorch_ms > 0 and run.exported_ms > 0
    (run,) = compare(network, network, [torch.ones(1, 3, 2, 2)])
    assert (run.error, run.pytorch_ms, run.exported_ms) == (0, None, None)


def test_a_difference_is_refused():
    good, bad = Run((1, 3, 8, 8), 1e-6, None, None), Run((1, 3, 9, 8), math.inf, None, None)
    require_equal([good])
    with pytest.raises(ConfigError, match=r"at 1 of 2 sizes, by inf at \(1, 3, 9, 8\)"):
        require_equal([good, bad])
    with pytest.raises(ConfigError, match="by nan"):
        require_equal([Run((1, 3, 9, 8), math.nan, None, None)])
