"""How fast models are and what memory they take, side by side: forward and training step, at one precision.

All models take turns in one process, so that what disturbs the machine disturbs all of them. Precision other than
float32 is autocast's, for every model alike. A training step is forward, mean-square distance to random maps, backward
and AdamW with a learning rate of 0, which does all its work and leaves the weights as they are; running statistics of
batch norms move. The memory that such a step adds has the gradients in it, but not AdamW's two moments: they stay from
step to step, twice the trained weights.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mmvmamba.analysis.memory import peak_of
from mmvmamba.analysis.timing import interleaved_seconds, percentile
from mmvmamba.errors import ConfigError, MMVMambaError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FORWARD, TRAINING = "forward", "training step"
#: What a model raises that cannot take a size, for want of memory or because it was built for others.
REFUSALS = (MMVMambaError, RuntimeError, MemoryError, ValueError, TypeError, AssertionError, IndexError)


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is measured.

    Attributes:
        name: As tables and figures call it.
        module: Owns the weights; it is on the device that is measured.
        run: Takes images (b, 3, h, w) and returns tensors, in any nesting; differentiable if it is to be trained.
    """

    name: str
    module: nn.Module
    run: Callable[[Tensor], Any]

    @property
    def weights_bytes(self) -> int:
        """Bytes of all parameters and buffers."""
        return sum(t.numel() * t.element_size() for t in (*self.module.parameters(), *self.module.buffers()))


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        dtype: A name of ``DTYPES``.
        device: Where the models are.
        seconds: Time for each case, all models together; the round in which it runs out is finished.
        least_rounds: Rounds that are measured in any case.
        most_rounds: Rounds after which a case ends.
    """

    dtype: str = "float32"
    device: torch.device = torch.device("cpu")  # noqa: RUF009  (immutable)
    seconds: float = 20.0
    least_rounds: int = 3
    most_rounds: int = 200

    def __post_init__(self) -> None:
        """Raise a ConfigError for what cannot be measured."""
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype is {self.dtype!r}, expected one of {', '.join(DTYPES)}. Choose one of them.")
        if self.dtype == "float16" and self.device.type == "cpu":
            raise ConfigError(
                "dtype is 'float16' on a CPU, expected 'float32' or 'bfloat16' there: few of its operators know "
                "float16. Choose one of these, or --device cuda."
            )
        if self.seconds < 0 or self.least_rounds < 1 or self.most_rounds < self.least_rounds:
            raise ConfigError(
                f"seconds is {self.seconds}, least_rounds {self.least_rounds} and most_rounds {self.most_rounds}, "
                "expected seconds of at least 0 and 1 <= least_rounds <= most_rounds. Correct them."
            )


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One model in one case.

    Attributes:
        model: Its name.
        step: ``FORWARD`` or ``TRAINING``.
        batch: Images of one call.
        height: Rows of them.
        width: Columns of them.
        dtype: The precision.
        rounds: Calls that were timed.
        minimum: Seconds of the fastest call.
        median: Seconds of the middle call, the 50th percentile.
        p90: 90 % of the calls took no longer.
        p99: 99 % of the calls took no longer.
        images_per_second: ``batch / median``.
        best_images_per_second: ``batch / minimum``, the least disturbed.
        weights_bytes: Of parameters and buffers.
        step_bytes: What a call adds to that at its highest moment (``mmvmamba.analysis.memory``), None if unknown.
        problem: Why there is no measurement, else an empty string; numbers are None then.
    """

    model: str
    step: str
    batch: int
    height: int
    width: int
    dtype: str
    rounds: int | None = None
    minimum: float | None = None
    median: float | None = None
    p90: float | None = None
    p99: float | None = None
    images_per_second: float | None = None
    best_images_per_second: float | None = None
    weights_bytes: int | None = None
    step_bytes: int | None = None
    problem: str = ""

    def row(self) -> dict[str, Any]:
        """The fields, for a table."""
        return dataclasses.asdict(self)


def measure(
    subjects: Sequence[Subject], images: Tensor, settings: Settings, *, train: bool = False
) -> list[Measurement]:
    """Measure the memory of a step of every subject, then time all of them on the same images, in turns.

    Args:
        subjects: What to measure; names differ.
        images: (b, 3, h, w) on the device of ``settings``.
        settings: How.
        train: Whether the step is a training step, not a forward.

    Returns:
        One measurement for each subject, in their order; one that refuses the images has a ``problem``.

    Raises:
        ConfigError: If two subjects have the same name, or one to be trained has nothing to train.
    """
    names = [subject.name for subject in subjects]
    if len(set(names)) < len(names):
        raise ConfigError(f"models are named {', '.join(names)}, expected names that differ. Name each model once.")
    batch, _, height, width = images.shape
    case: dict[str, Any] = dict(
        step=TRAINING if train else FORWARD, batch=batch, height=height, width=width, dtype=settings.dtype
    )
    problems: dict[str, str] = {}
    steps: dict[str, Callable[[], object]] = {}
    peaks: dict[str, int | None] = {}
    for subject in subjects:
        step = (training_step if train else forward_step)(subject, images, settings.dtype)
        try:
            step()  # what the first call loads and keeps is no part of the second
            subject.module.zero_grad(set_to_none=True)
            peaks[subject.name] = peak_of(step, settings.device)
        except REFUSALS as error:
            problems[subject.name] = refusal(error)
            continue
        steps[subject.name] = step
    clock = _clock(settings.device)
    # With a limit for every contestant, none is run once more before the clock starts.
    limits = dict.fromkeys(steps, settings.most_rounds)
    times = interleaved_seconds(
        steps, settings.seconds, settings.most_rounds, limits, measure=clock, least_rounds=settings.least_rounds
    )
    for subject in subjects:
        subject.module.zero_grad(set_to_none=True)
        subject.module.eval()
    return [
        Measurement(subject.name, **case, problem=problems[subject.name])
        if subject.name in problems
        else _summary(subject, case, times[subject.name], peaks[subject.name])
        for subject in subjects
    ]


def _summary(subject: Subject, case: Mapping[str, Any], seconds: Sequence[float], peak: int | None) -> Measurement:
    median = percentile(seconds, 50)
    return Measurement(
        subject.name,
        **case,
        rounds=len(seconds),
        minimum=min(seconds),
        median=median,
        p90=percentile(seconds, 90),
        p99=percentile(seconds, 99),
        images_per_second=case["batch"] / median,
        best_images_per_second=case["batch"] / min(seconds),
        weights_bytes=subject.weights_bytes,
        step_bytes=peak,
    )


def refusal(error: BaseException) -> str:
    """Return one line about why a model could not take a size."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."


def _clock(device: torch.device) -> Callable[[Callable[[], object]], float]:
    def seconds(run: Callable[[], object]) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    return seconds


def forward_step(subject: Subject, images: Tensor, dtype: str) -> Callable[[], Any]:
    """Return a function that infers once, under autocast unless ``dtype`` is float32."""
    subject.module.eval()

    def run() -> Any:
        with torch.no_grad(), _precision(images, dtype):
            return subject.run(images)

    return run


def training_step(subject: Subject, images: Tensor, dtype: str) -> Callable[[], Tensor]:
    """Return a function that takes one training step; the module is in training form during it only."""
    parameters = [parameter for parameter in subject.module.parameters() if parameter.requires_grad]
    if not parameters:
        raise ConfigError(
            f"{subject.name} has no parameter that wants a gradient, expected one to train. Thaw a part of it "
            "(frozen_stages), or measure the forward."
        )
    adamw = torch.optim.AdamW(parameters, lr=0.0)
    loss_of = MeanSquare()

    def run() -> Tensor:
        subject.module.train()
        subject.module.zero_grad(set_to_none=True)
        with _precision(images, dtype):
            loss = loss_of(list(_tensors(subject.run(images))))
        loss.backward()
        adamw.step()
        subject.module.eval()
        return loss.detach()

    return run


def _precision(images: Tensor, dtype: str) -> torch.autocast:
    return torch.autocast(images.device.type, DTYPES[dtype], enabled=dtype != "float32")


def _tensors(outputs: Any) -> Iterator[Tensor]:
    yield from (leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad)


class MeanSquare:
    """The loss of a training step: mean-square distance to random maps, drawn at the first call.

    The mean square of the maps alone would not do: they come out of a layer norm, so it is constant, and its gradients
    are rounding errors.
    """

    def __init__(self) -> None:
        self.targets: list[Tensor] = []

    def __call__(self, outputs: Sequence[Tensor]) -> Tensor:
        """Return the loss of feature maps."""
        if not self.targets:
            self.targets = [torch.randn(out.shape).to(out.device) for out in outputs]
        total = outputs[0].new_zeros((), dtype=torch.float32)
        for out, target in zip(outputs, self.targets, strict=True):
            total = total + (out - target.to(out.dtype)).float().square().mean()
        return total


def figure_of(measurements: Sequence[Measurement], device: str) -> Any:
    """Return a figure: images per second and latency by batch, then memory; a row of bars for each step.

    Raises:
        MissingPackage: If matplotlib is not installed.
    """
    from mmvmamba.analysis.outputs import new_figure

    steps = [step for step in (FORWARD, TRAINING) if any(m.step == step for m in measurements)]
    figure, axes = new_figure(3, len(steps), width=4.6, height=1.6 + 0.55 * len({m.model for m in measurements}))
    for row, step in zip(axes, steps, strict=True):
        shown = [m for m in measurements if m.step == step and not m.problem]
        several = len({(m.batch, m.height, m.width) for m in shown}) > 1
        labels = [f"{m.model}\n{m.batch} x {m.height} x {m.width}" if several else m.model for m in shown]
        positions = range(len(shown))
        row[0].barh(positions, [m.images_per_second for m in shown], color="tab:blue")
        row[0].set_xlabel(f"images per second, median ({step})")
        for name, colour, height in (("p99", "0.85", 0.8), ("p90", "tab:cyan", 0.6), ("median", "tab:blue", 0.4)):
            row[1].barh(positions, [1e3 * getattr(m, name) for m in shown], height, color=colour, label=name)
        row[1].set_xlabel(f"milliseconds per call ({step})")
        row[1].legend(fontsize=8)
        weights = [m.weights_bytes / 2**20 for m in shown if m.weights_bytes is not None]
        row[2].barh(positions, weights, color="tab:gray", label="weights")
        added = [(m.step_bytes or 0) / 2**20 for m in shown]
        row[2].barh(positions, added, left=weights, color="tab:orange", label=f"added by a {step}")
        row[2].set_xlabel("peak memory, MiB")
        row[2].legend(fontsize=8)
        for column, axis in enumerate(row):
            axis.set_yticks(positions, labels if column == 0 else [""] * len(shown), fontsize=8)
            axis.invert_yaxis()
            axis.grid(axis="x", alpha=0.3)
    first = measurements[0]
    size = (
        f", batch {first.batch}, {first.height} x {first.width}"
        if len({(m.batch, m.height, m.width) for m in measurements}) == 1
        else ""
    )
    figure.suptitle(f"{first.dtype}{size}, {device}", fontsize=10)
    return figure
