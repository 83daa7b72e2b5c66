"""Objects painted into a picture: where they are, in whose colour, and which are left out."""

import cv2
import numpy as np
import pytest
import torch

pytest.importorskip("mmengine")

from mmengine.structures import InstanceData

from mmvmamba.analysis.images import encode_png, enlarged, shrunk
from mmvmamba.analysis.painting import paint_objects

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
NAMES, PALETTE = ("a", "b", "ç"), (RED, GREEN, BLUE)


def _objects(boxes, labels, scores, masks=None):
    found = InstanceData(
        bboxes=torch.tensor(boxes, dtype=torch.float32), labels=torch.tensor(labels), scores=torch.tensor(scores)
    )
    if masks is not None:
        found.masks = masks
    return found


def _paint(found, factor=1, size=(100, 120), threshold=0.5):
    image = np.full((*size, 3), 40, np.uint8)
    return paint_objects(image, found, NAMES, PALETTE, score_threshold=threshold, factor=factor)


@pytest.mark.parametrize("factor", [1, 3])
def test_box_and_mask_are_where_they_belong(factor):
    mask = torch.zeros(1, 100, 120, dtype=torch.bool)
    mask[0, 50:70, 60:90] = True
    drawn = _paint(_objects([[50, 40, 100, 80]], [1], [0.9], mask), factor)
    assert drawn.shape == (100 * factor, 120 * factor, 3)
    assert tuple(drawn[60 * factor, 50 * factor]) == GREEN and tuple(drawn[80 * factor, 75 * factor]) == GREEN
    inside = drawn[60 * factor, 75 * factor].astype(int)
    assert abs(inside - np.array([22, 136, 22])).max() <= 2  # 0.55 of the picture's 40, 0.45 of the colour
    assert tuple(drawn[60 * factor, 55 * factor]) == (40, 40, 40)  # in the box, not in the mask
    assert (drawn[90 * factor :] == 40).all() and (drawn[:, : 45 * factor] == 40).all()


def test_scores_below_the_threshold_are_left_out_and_the_surest_is_on_top():
    found = _objects([[10, 30, 60, 80], [10, 30, 60, 80], [70, 30, 110, 80]], [0, 2, 1], [0.9, 0.6, 0.4])
    drawn = _paint(found)
    assert tuple(drawn[55, 10]) == RED
    assert (drawn[:, 90:] == 40).all()
    assert (_paint(_objects(np.zeros((0, 4)), [], [])) == 40).all()


def test_labels_stay_inside_the_picture():
    drawn = _paint(_objects([[0, 0, 20, 20], [110, 2, 119, 99]], [0, 2], [0.9, 0.8]))
    text = (drawn != 40).any(-1)
    assert text[2:12, 0:40].mean() > 0.5  # there was no room above
    assert text[4:12, 80:119].mean() > 0.5  # nor to the right
    words = drawn[text]
    assert {tuple(colour) for colour in words} >= {RED, BLUE}


def test_sizes():
    image = np.random.default_rng(0).integers(0, 255, (50, 200, 3), np.uint8)
    assert shrunk(image, 200) is image
    assert shrunk(image, 100).shape == (25, 100, 3)
    assert shrunk(np.zeros((1, 3000, 3), np.uint8), 1000).shape == (1, 1000, 3)
    assert enlarged(image, 3).shape == (150, 600, 3)
    decoded = cv2.imdecode(np.frombuffer(encode_png(image), np.uint8), cv2.IMREAD_COLOR)
    assert (decoded[..., ::-1] == image).all()
