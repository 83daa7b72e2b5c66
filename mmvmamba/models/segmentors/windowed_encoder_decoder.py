"""MMSegmentation's encoder-decoder, whose test in windows needs no more memory of the GPU for larger images."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from mmengine.model import BaseModel
from torch import Tensor

from mmvmamba.registry import MODELS

#: Where a device's own memory is what has to be spared, class scores are summed in main memory.
_SUMMED_IN_PLACE = ("cpu", "meta")


# A function, so that a config can name it where MMSegmentation is not installed.
@MODELS.register_module(name="WindowedEncoderDecoder")
def build_windowed_encoder_decoder(**settings: Any) -> BaseModel:
    """Build an ``EncoderDecoder`` of MMSegmentation that sums the scores of windows outside of the GPU.

    With ``test_cfg=dict(mode="slide", ...)`` the GPU then holds what one window needs, and main memory the class scores
    of the image, once. MMSegmentation keeps the scores of the whole image on the GPU, in two copies, which takes more
    than the network does at once (``EncoderDecoder.slide_inference``). The sums are the same, bit for bit on a CPU.
    Everything else, names of weights included, is MMSegmentation's.

    Args:
        settings: Arguments of ``EncoderDecoder``, which refuses others.

    Raises:
        ImportError: If MMSegmentation is not installed.
    """
    return _windowed_class()(**settings)


@functools.cache
def _windowed_class() -> type[BaseModel]:
    from mmseg.models import EncoderDecoder

    class WindowedEncoderDecoder(EncoderDecoder):
        """See ``build_windowed_encoder_decoder``."""

        def slide_inference(self, inputs: Tensor, batch_img_metas: list[dict[str, Any]]) -> Tensor:
            """Return class scores (b, classes, h, w) of images (b, c, h, w), the mean over all windows of a pixel."""
            b, _, h, w = inputs.shape
            device = inputs.device if inputs.device.type in _SUMMED_IN_PLACE else torch.device("cpu")
            scores = torch.zeros(b, self.out_channels, h, w, dtype=inputs.dtype, device=device)
            times = torch.zeros(h, w, dtype=inputs.dtype, device=device)
            (crop_h, crop_w), (step_h, step_w) = self.test_cfg.crop_size, self.test_cfg.stride
            for rows in windows(h, crop_h, step_h):
                for columns in windows(w, crop_w, step_w):
                    window = inputs[:, :, rows, columns]
                    metas = [{**meta, "img_shape": window.shape[2:]} for meta in batch_img_metas]
                    scores[:, :, rows, columns] += self.encode_decode(window, metas).to(scores)
                    times[rows, columns] += 1
            return scores.div_(times)

    return WindowedEncoderDecoder


def windows(length: int, crop: int, step: int) -> Iterator[slice]:
    """Yield the windows of one side of an image; the last one ends with the image and so may overlap more.

    Args:
        length: Pixels of the side; if there are fewer than ``crop``, one window has them all.
        crop: Pixels of a window.
        step: Pixels from one window to the next.
    """
    for number in range(max(length - crop + step - 1, 0) // step + 1):
        end = min(number * step + crop, length)
        yield slice(max(end - crop, 0), end)
