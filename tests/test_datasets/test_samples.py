"""The sample pictures: always the same, of digits that are kept from training, and large enough to see something."""

import cv2
import numpy as np
import pytest

pytest.importorskip("sklearn")

from mmvmamba.datasets.digit_scenes import load_digit_sources
from mmvmamba.datasets.samples import _scenes, write_samples
from mmvmamba.errors import OutputError


def test_samples_are_the_same_every_time(tmp_path):
    written = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        written.append(write_samples(tmp_path / name))
    assert [sample.name for sample in written[0]] == [
        "digits 1", "digits 2", "digits 3", "digits 4", "one digit 1", "one digit 2", "temple", "flower",
    ]  # fmt: skip
    for one, other in zip(*written, strict=True):
        assert one.path.read_bytes() == other.path.read_bytes()
        image = cv2.imread(str(one.path))
        assert min(image.shape[:2]) >= 64 and image.std() > 10
    names = {sample.name: cv2.imread(str(sample.path)) for sample in written[0]}
    assert names["one digit 1"].shape == (64, 64, 3)
    temple = names["temple"][:100].reshape(-1, 3).mean(0)  # its sky, BGR
    assert temple[0] > temple[2] > 150


def test_scenes_are_of_scans_that_are_kept_from_training():
    sources = load_digit_sources(0)
    kept, trained = (set(sources[split].indices.tolist()) for split in ("val", "train"))
    scenes = _scenes(sources["val"])
    for _ in range(6):
        scene = next(scenes)
        used = {index for instance in scene.instances for index in instance.sources}
        assert len(scene.instances) >= 3 and used <= kept and not used & trained
        assert not any(instance.crowd for instance in scene.instances)
        assert scene.image.dtype == np.uint8


def test_folder_that_is_not_there(tmp_path):
    with pytest.raises(OutputError, match="could not write .*digits-1.png"):
        write_samples(tmp_path / "absent")
