"""How many bytes of tensors a segmentor's test of one image holds at most, by its config; nothing is computed.

``python -m benchmarks.slide_memory CONFIG... --sides 1024 2048`` lets each model see square images on PyTorch's meta
device, which knows shapes only, and follows every tensor from its making to its end. Counted are activations and class
scores, up to those that ``inference`` of mmseg's segmentors returns, in float32; not the parameters, and not what
kernels need inside.
"""

from __future__ import annotations

import argparse
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.registry import MODELS, init_default_scope
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmvmamba.apis import load_config


class LiveBytes(TorchDispatchMode):
    """Follows the memory of all tensors that are made inside; ``peak`` is the most at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._live: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and note what it has made."""
        if func.overloadpacket is torch.ops.aten._local_scalar_dense:
            return True  # mmseg asserts that the windows cover the image
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in self._live:
                storage = leaf.untyped_storage()
                self._live.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._end, storage._cdata, storage.nbytes())
        return out

    def _end(self, key: int, size: int) -> None:
        self._live.discard(key)
        self.now -= size


def peak_bytes(model: torch.nn.Module, side: int) -> int:
    """Return the peak of a segmentor on the meta device and an image of ``side`` x ``side``."""
    image = torch.empty(1, 3, side, side, device="meta")
    info = dict(img_shape=(side, side), ori_shape=(side, side), pad_shape=(side, side))
    with torch.no_grad(), LiveBytes() as live:
        model.inference(image, [info])  # type: ignore[operator]
    return live.peak


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line per config and size."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0], allow_abbrev=False)
    parser.add_argument("configs", nargs="+", help="configs of segmentors")
    parser.add_argument("--sides", type=int, nargs="+", default=[512, 1024, 2048, 4096], help="of the square images")
    args = parser.parse_args(arguments)
    for config in args.configs:
        cfg = load_config(config)
        init_default_scope(cfg.default_scope)
        cfg.model.backbone.init_cfg = None
        model = MODELS.build(cfg.model).eval().to("meta")
        peaks = ", ".join(f"{side}: {peak_bytes(model, side) / 1e9:.2f} GB" for side in args.sides)
        print(f"{Path(config).stem}: {peaks}")


if __name__ == "__main__":
    main()
