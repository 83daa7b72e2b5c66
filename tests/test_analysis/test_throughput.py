"""Measurements of subjects whose speed, memory and refusals are known; which part of a network is measured."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mmvmamba.analysis import memory
from mmvmamba.analysis.outputs import save_figure
from mmvmamba.analysis.throughput import (
    FORWARD,
    TRAINING,
    Measurement,
    Settings,
    Subject,
    figure_of,
    measure,
    training_step,
)
from mmvmamba.analysis.timing import percentile
from mmvmamba.apis.measured import measured_part, measured_parts
from mmvmamba.apis.networks import load_networks
from mmvmamba.errors import ConfigError
from tests.nano_models import digits_config, script

MIB = 1 << 20
CPU = torch.device("cpu")
CAN_MEASURE = memory.reset_mark()


class Plain(nn.Module):
    """A convolution that can wait, and notes what it sees."""

    def __init__(self, seconds: float = 0.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.seconds = seconds
        self.seen: list[tuple[torch.dtype, bool, bool]] = []

    def forward(self, x: Tensor) -> list[Tensor]:
        time.sleep(self.seconds)
        out = self.conv(x)
        self.seen.append((out.dtype, self.training, torch.is_grad_enabled()))
        return [self.norm(out)]


def subject(name: str, module: nn.Module) -> Subject:
    return Subject(name, module, module)


def test_percentiles_are_those_of_numpy():
    seconds = np.random.default_rng(0).random(37).tolist()
    for percent in (0, 50, 90, 99, 100):
        assert percentile(seconds, percent) == pytest.approx(np.percentile(seconds, percent))
    assert percentile([2.0], 99) == 2.0


def test_times_and_images_per_second():
    subjects = [subject("fast", Plain(0.02)), subject("slow", Plain(0.06))]
    settings = Settings(seconds=0.0, least_rounds=4)
    fast, slow = measure(subjects, torch.randn(2, 3, 8, 8), settings)
    assert (fast.model, fast.step, fast.batch, fast.height, fast.rounds, slow.rounds) == ("fast", FORWARD, 2, 8, 4, 4)
    for one, seconds in ((fast, 0.02), (slow, 0.06)):
        assert seconds <= one.minimum <= one.median <= one.p90 <= one.p99
        assert one.images_per_second == pytest.approx(2 / one.median)
        assert one.best_images_per_second == pytest.approx(2 / one.minimum)
        # 4 kernels of 3 x 3 x 3 and biases; the norm's weight, bias, two statistics and, of 8 bytes, its counter.
        assert one.weights_bytes == 4 * (4 * 28 + 4 * 4) + 8
    # A call before, one for the memory, then the rounds; evaluation form, without gradients.
    assert subjects[0].module.seen == [(torch.float32, False, False)] * 6


@pytest.mark.skipif(not CAN_MEASURE, reason="needs /proc/self/clear_refs")
@pytest.mark.parametrize("mebibytes", [24, 96])
def test_memory_of_a_forward_is_what_it_allocates(mebibytes):
    class Allocates(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ones(mebibytes * MIB, dtype=torch.uint8)[:1].clone()

    (found,) = measure([subject("one", Allocates())], torch.randn(1, 3, 4, 4), Settings(seconds=0.0))
    assert found.step_bytes == pytest.approx(mebibytes * MIB, abs=8 * MIB)


@pytest.mark.skipif(not CAN_MEASURE, reason="needs /proc/self/clear_refs")
def test_memory_of_a_training_step_has_the_gradients_in_it():
    layer = nn.Linear(2048, 4096)  # 32 MiB of weights, and as much of their gradient
    module = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2048), layer)
    (found,) = measure([subject("one", module)], torch.randn(1, 3, 4, 4), Settings(seconds=0.0), train=True)
    assert 32 * MIB <= found.step_bytes < 112 * MIB  # AdamW computes the step of a weight in two more of its size
    assert found.weights_bytes == 4 * sum(p.numel() for p in module.parameters())
    assert all(parameter.grad is None for parameter in module.parameters())


def test_where_the_mark_cannot_be_reset_memory_is_unknown(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_CLEAR", tmp_path / "missing" / "clear_refs")
    (found,) = measure([subject("one", Plain())], torch.randn(1, 3, 8, 8), Settings(seconds=0.0))
    assert found.step_bytes is None and found.images_per_second > 0
    assert memory.how_measured(CPU).startswith("not measured: ")


def test_a_training_step_computes_gradients_and_leaves_the_weights():
    torch.manual_seed(0)
    module = Plain()
    before = {name: p.clone() for name, p in module.named_parameters()}
    step = training_step(subject("one", module), torch.randn(2, 3, 8, 8), "float32")
    step()
    assert all(
        p.grad is not None and p.grad.abs().max() > 0 for name, p in module.named_parameters() if "bias" not in name
    )
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())
    assert module.seen == [(torch.float32, True, True)] and not module.training
    (found,) = measure([subject("one", module)], torch.randn(2, 3, 8, 8), Settings(seconds=0.0), train=True)
    assert found.step == TRAINING and found.images_per_second > 0


def test_the_loss_of_a_training_step_is_the_distance_to_random_maps():
    torch.manual_seed(0)
    module = Plain()
    step = training_step(subject("one", module), (images := torch.randn(2, 3, 8, 8)), "float32")
    torch.manual_seed(1)
    loss = step()
    torch.manual_seed(1)
    (out,) = module.train()(images)
    torch.testing.assert_close(loss, (out - torch.randn(out.shape)).square().mean().detach())


def test_one_precision_for_all():
    modules = [Plain(), Plain()]
    subjects = [subject(str(index), module) for index, module in enumerate(modules)]
    measure(subjects, torch.randn(1, 3, 8, 8), Settings("bfloat16", seconds=0.0, least_rounds=1))
    assert {dtype for module in modules for dtype, _, _ in module.seen} == {torch.bfloat16}


def test_what_refuses_a_size_says_so_and_the_others_go_on():
    class Refuses(Plain):
        def forward(self, x: Tensor) -> list[Tensor]:
            raise RuntimeError("no such\nsize")

    found = measure([subject("a", Refuses()), subject("b", Plain())], torch.randn(1, 3, 8, 8), Settings(seconds=0.0))
    assert found[0] == Measurement("a", FORWARD, 1, 8, 8, "float32", problem="no such size")
    assert found[1].problem == "" and found[1].rounds >= 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(dtype="float8"), "dtype is 'float8', expected one of float32, bfloat16, float16"),
        (dict(dtype="float16"), "dtype is 'float16' on a CPU, expected 'float32' or 'bfloat16' there"),
        (dict(seconds=-1.0), "seconds is -1.0"),
        (dict(least_rounds=0), "least_rounds 0"),
        (dict(most_rounds=2), "most_rounds 2"),
    ],
    ids=str,
)
def test_settings_are_checked(arguments, message):
    with pytest.raises(ConfigError, match=message):
        Settings(**arguments)


def test_names_differ_and_something_is_trained():
    images = torch.randn(1, 3, 8, 8)
    with pytest.raises(ConfigError, match="models are named a, a, expected names that differ"):
        measure([subject("a", Plain())] * 2, images, Settings())
    with pytest.raises(ConfigError, match="a has no parameter that wants a gradient"):
        measure([subject("a", Plain().requires_grad_(False))], images, Settings(), train=True)


@pytest.fixture(scope="module")
def networks():
    for name in ("mmdet", "mmseg", "mmpretrain"):
        pytest.importorskip(name)
    torch.manual_seed(0)
    return {task: load_networks([digits_config(task)], device="cpu")[0] for task in ("cls", "det", "seg")}


def test_parts_of_networks(networks):
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        for network in networks.values():
            backbone = measured_part(network, "backbone")
            assert backbone.module is network.backbone and backbone.name == network.name
            assert [out.shape[0] for out in backbone.run(images)] == [2] * len(network.backbone.out_indices)
        scores = measured_part(networks["cls"], "network").run(images)
        torch.testing.assert_close(scores, networks["cls"].model.head(networks["cls"].model.extract_feat(images)))
        assert measured_part(networks["seg"], "network").run(images).shape == (2, 11, 16, 24)
        boxes = measured_part(networks["det"], "network").run(images)
        assert [tuple(sample.img_shape) for sample in boxes] == [(64, 96)] * 2 and "pred_instances" in boxes[0]


def test_parts_that_cannot_be_measured(networks):
    with pytest.raises(ConfigError, match="part is 'neck', expected one of backbone, network"):
        measured_part(networks["cls"], "neck")
    with pytest.raises(ConfigError, match="the losses of a detector need annotated images"):
        measured_part(networks["det"], "network", train=True)
    names = [each.name for each in measured_parts([networks["cls"], networks["seg"], networks["cls"]], "backbone")]
    assert names == ["vmamba-nano_digits (1)", "vmamba-nano_upernet_digits", "vmamba-nano_digits (2)"]


def test_the_figure_has_what_was_measured(tmp_path):
    numbers = dict(rounds=3, minimum=0.1, median=0.2, p90=0.3, p99=0.4, images_per_second=5.0, weights_bytes=MIB)
    rows = [
        Measurement(name, step, 1, 8, 8, "float32", **numbers, step_bytes=memory)
        for step in (FORWARD, TRAINING)
        for name, memory in (("a", 2 * MIB), ("b", None))
    ]
    refused = Measurement("c", FORWARD, 1, 8, 8, "float32", problem="too small")
    figure = figure_of([*rows, refused], "a machine")
    assert len(figure.axes) == 6
    assert [bar.get_width() for bar in figure.axes[0].patches] == [5.0, 5.0]
    assert [bar.get_width() for bar in figure.axes[2].patches] == [1.0, 1.0, 2.0, 0.0]
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["a", "b"]
    assert save_figure(figure, tmp_path / "figure.png").stat().st_size > 5000


def test_the_tool_writes_a_table_and_three_files(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("mmvmamba.analysis.throughput.Settings.seconds", 0.0, raising=False)
    tool = script("tools/analysis_tools/benchmark.py")
    command = f"benchmark.py {digits_config('cls')} --shape 32 48 --batch 1 2 --train --seconds 0 --out-dir {tmp_path}"
    monkeypatch.setattr("sys.argv", [*command.split(), "--device", "cpu"])
    tool.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["model", "step", "batch"]
    assert [line.split()[0] for line in lines[1:5]] == ["vmamba-nano_digits"] * 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["benchmark.csv", "benchmark.json", "benchmark.png"]
    assert len((tmp_path / "benchmark.csv").read_text().splitlines()) == 5


def test_the_tool_checks_before_it_builds(tmp_path, monkeypatch):
    tool = script("tools/analysis_tools/benchmark.py")
    (tmp_path / "taken").write_text("")
    for words, message in (
        (["missing.py", "--batch", "0"], "batch is \\[0\\]"),
        (["missing.py", "--out-dir", str(tmp_path / "taken")], "the folder .* cannot be written to"),
        (["missing.py", "--out-dir", str(tmp_path / "new")], "config is 'missing.py', which is no file"),
    ):
        monkeypatch.setattr("sys.argv", ["benchmark.py", *words, "--device", "cpu"])
        with pytest.raises((ConfigError, OSError), match=message):
            tool.main()
