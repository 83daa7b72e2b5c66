"""Latency of the mobile classifiers on a CPU: ``python -m benchmarks.mobile --threads 1 --json FILE``.

Every released variant of the mobile families, one image of 224x224 in float32, from image to scores, in two forms: as
it is trained, in evaluation mode, and as it is deployed (``mmvmamba.models.fold_batch_norms``). Beside them are
MobileNetV3-Large and EfficientNet-B0 of mmpretrain, as they are and with the batch norms that mmcv folds
(``mmcv.cnn.fuse_conv_bn``).
All run in one process, interleaved. Weights are random; the statistics of the batch norms are those of a random batch,
and before anything is timed both forms of a model must agree to 1e-5.

All variants are taken at one size, whatever their official one is, and of several that differ in it alone the first.
"""

from __future__ import annotations

import argparse
import copy
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import DisagreementError, Notes, check, interleave, save
from benchmarks.models import parse_size
from mmvmamba.analysis.flops import count_backbone
from mmvmamba.converters.base import from_upstream, load_converter
from mmvmamba.models import fold_batch_norms
from mmvmamba.models.backbones import FAMILIES

Row = dict[str, Any]
MOBILE = tuple(family for family in ("mobilemamba", "efficientvim") if family in FAMILIES)
TRAINED, DEPLOYED = "as trained", "deployed"
#: mmpretrain's name of a model -> ours.
PEERS = {
    "mobilenet-v3-large_8xb128_in1k": "MobileNetV3-Large",
    "efficientnet-b0_3rdparty_8xb32_in1k": "EfficientNet-B0",
}
BOUND = 1e-5
CLASSES = 1000


def build(family: str, variant: str) -> nn.Module:
    """Build the classifier of a released variant."""
    return from_upstream(family, "classifier", {**load_converter(family).released[variant], "num_classes": CLASSES})


def build_peer(name: str) -> nn.Module:
    """Build a model of mmpretrain by its name, with random weights."""
    from mmpretrain import get_model

    model: nn.Module = get_model(name, pretrained=False)
    return model


def fuse(model: nn.Module) -> nn.Module:
    """Return the deployment form of a model that is not ours, a copy."""
    from mmcv.cnn import fuse_conv_bn

    fused: nn.Module = fuse_conv_bn(copy.deepcopy(model))
    return fused


def settle(model: nn.Module, size: tuple[int, int]) -> nn.Module:
    """Give the batch norms of a new model the statistics of random images, so that folding them changes something."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.randn(4, 3, *size))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()


class Suite:
    """What one call measures; rows are printed at the end."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.size = parse_size(options.size)
        self.notes = Notes()
        #: (contestant, form) -> what is timed, in this order.
        self.models: dict[tuple[str, str], nn.Module] = {}
        self.rows: list[Row] = []

    def contestants(self) -> Iterator[tuple[str, Callable[[], nn.Module], Callable[[nn.Module], nn.Module]]]:
        """Yield name, constructor and folding of all that takes part."""
        for family in self.options.families:
            seen: dict[Any, str] = {}
            for variant in load_converter(family).released:
                if variant not in (self.options.variants or [variant]):
                    continue
                same = seen.setdefault(_arch(family, variant), variant)
                if same == variant:
                    yield f"{family} {variant}", functools.partial(build, family, variant), fold_batch_norms
                else:
                    self.notes.skip(f"{family} {variant}", f"the network of {same} at another size")
        for name, title in PEERS.items():
            yield title, functools.partial(build_peer, name), fuse

    def prepare(self) -> None:
        """Build all models in both forms, and compare these."""
        image = torch.randn(1, 3, *self.size)
        for title, constructor, fold in self.contestants():
            model = settle(constructor(), self.size)
            deployed = fold(model)
            expected = {"scores": _scores(model, image).double()}
            check(f"{title}, {DEPLOYED}", {"scores": _scores(deployed, image)}, expected, {"scores": BOUND})
            self.models[title, TRAINED], self.models[title, DEPLOYED] = model, deployed

    def run(self) -> None:
        """Time all of it and keep the rows."""
        image = torch.randn(1, 3, *self.size)
        names = {" | ".join(key): key for key in self.models}
        runs = {name: _step(self.models[key], image) for name, key in names.items()}
        timings = interleave(runs, self.options.seconds, self.options.rounds)
        of_key = {names[name]: timing for name, timing in timings.items()}
        for (title, form), timing in of_key.items():
            row: Row = {
                "case": self.options.size,
                "pass": "forward",
                "dtype": "float32",
                "contestant": title,
                "form": form,
                "parameters": sum(p.numel() for p in self.models[title, TRAINED].parameters()),
                "flops": count_backbone(self.models[title, TRAINED], *self.size).flops,
                "over_trained": timing.minimum / of_key[title, TRAINED].minimum,
                **{f"over {peer}": timing.minimum / of_key[peer, DEPLOYED].minimum for peer in PEERS.values()},
                **timing.fields(),
            }
            self.rows.append(row)
            ratios = "   ".join(f"{row[f'over {peer}']:6.2f} x {peer}" for peer in PEERS.values())
            print(
                f"{title:22} {form:10} {1e3 * timing.minimum:8.2f} ms (median {1e3 * timing.median:.2f})   "
                f"{row['flops'] / 1e6:6.0f} M   {ratios}, {DEPLOYED}",
                flush=True,
            )


def _arch(family: str, variant: str) -> Any:
    cls: Callable[..., Any] = FAMILIES[family]
    with torch.device("meta"):
        return cls(variant).arch


def _scores(model: nn.Module, image: Tensor) -> Tensor:
    with torch.no_grad():
        scores: Tensor = model(image)
    return scores


def _step(model: nn.Module, image: Tensor) -> Callable[[], Tensor]:
    return lambda: _scores(model, image)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--size", default="224", help="side, or rows x columns")
    parser.add_argument("--seconds", type=float, default=120.0, help="time, but three rounds")
    parser.add_argument("--rounds", type=int, default=200, help="most rounds")
    parser.add_argument("--families", nargs="+", choices=MOBILE, default=list(MOBILE))
    parser.add_argument("--variants", nargs="+", help="of the families that have them (default: all)")
    parser.add_argument("--json", type=Path, help="also write the raw results here")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Build, compare, time, print; return the exit code."""
    options = parse(arguments)
    offered = [name for family in options.families for name in load_converter(family).released]
    try:
        parse_size(options.size)
        if unknown := [name for name in options.variants or () if name not in offered]:
            raise ValueError(
                f"--variants names {', '.join(unknown)}, expected variants of {', '.join(options.families)}: "
                f"{', '.join(dict.fromkeys(offered))}. Correct it, or add the family to --families."
            )
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    suite = Suite(options)
    try:
        suite.prepare()
        suite.run()
    except DisagreementError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.json:
        save(options.json, "mobile", suite.rows, suite.notes.lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
