"""Every instruction set keeps what the tests of this folder ask of the best one (performance 5, issue 3)."""

from __future__ import annotations

import pytest
import torch

from mmvmamba.testing import requires_extension
from tests.instruction_sets import CAPABILITIES, passed_with
from tests.test_ops.samples import MAKERS
from tests.test_ops.test_random_configurations import FEW_CHANNELS

SEEDS = range(41)
FOLDER = "tests/test_ops"


def test_the_samples_have_odd_widths_and_permutations() -> None:
    """What the tests below rely on: blocks that are not whole vectors, and routes of every kind."""
    samples = [MAKERS["scan2d"](seed) for seed in SEEDS]
    widths = {sample.tensors["x"].shape[-1] for sample in samples if sample.dtype == torch.float32}
    assert any(width > 16 and width % 16 for width in widths)
    permuted = [sample for sample in samples if isinstance(sample.options["orders"], torch.Tensor)]
    assert 4 <= len(permuted) < len(samples)


@requires_extension()
@pytest.mark.ext
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_random_configurations(capability: str) -> None:
    file = f"{FOLDER}/test_random_configurations.py"
    tests = [f"{file}::test_compiled[{seed}-{name}]" for name in MAKERS for seed in SEEDS]
    few = f"{file}::test_fewer_channels_than_a_vector_has"
    assert passed_with(capability, *tests, few) == len(tests) + 2 * len(FEW_CHANNELS)


@requires_extension()
@pytest.mark.ext
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_extreme_values_and_empty_routes(capability: str) -> None:
    files = [f"{FOLDER}/test_{name}.py" for name in ("decay_range", "extremes", "exact", "depthwise_conv")]
    assert passed_with(capability, *files, "-k", "compiled") > 150
