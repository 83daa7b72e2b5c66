"""Evaluation: the quick metric is pycocotools', mIoU is a count, and a test gives the same numbers each time."""

import json
import re
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")
pytest.importorskip("mmpretrain")

from mmengine.config import Config
from mmengine.fileio import load

from mmvmamba.analysis.tables import class_table
from mmvmamba.apis import prepare_testing
from mmvmamba.errors import ConfigError
from tests.nano_models import NAMES, digits_config, nano_checkpoint, script

#: All twelve of COCO, under mmdet's names (its limits of objects per image are 100, 300 and 1000).
TWELVE = (
    *("mAP", "mAP_50", "mAP_75", "mAP_s", "mAP_m", "mAP_l"),
    *("AR@100", "AR@300", "AR@1000", "AR_s@1000", "AR_m@1000", "AR_l@1000"),
)


def _detections(annotations, seed):
    """Return what a middling detector would say: most objects, moved a little, some wrong, some invented."""
    from pycocotools.coco import COCO

    coco = COCO(str(annotations))
    rng = np.random.default_rng(seed)
    samples = []
    for image in coco.loadImgs(coco.getImgIds()):
        height, width = image["height"], image["width"]
        boxes, labels, masks = [], [], []
        for entry in coco.loadAnns(coco.getAnnIds(image["id"])):
            for _ in range(int(rng.integers(0, 3))):
                shift = tuple(int(step) for step in rng.integers(-1, 2, 2))
                mask = np.roll(coco.annToMask(entry), shift, (0, 1))
                x, y, w, h = entry["bbox"]
                boxes.append(np.array([x, y, x + w, y + h]) + rng.normal(0, 2.5, 4))
                labels.append(entry["category_id"] - 1 if rng.random() < 0.8 else int(rng.integers(10)))
                masks.append(mask)
        for _ in range(int(rng.integers(0, 3))):
            mask = np.zeros((height, width), np.uint8)
            mask[5:40, 7:30] = 1
            boxes.append(np.array([7, 5, 30, 40.0]))
            labels.append(int(rng.integers(10)))
            masks.append(mask)
        instances = {
            "bboxes": torch.tensor(np.array(boxes, np.float32).reshape(-1, 4)),
            "labels": torch.tensor(labels, dtype=torch.int64),
            "scores": torch.tensor(rng.random(len(labels)).round(1), dtype=torch.float32),  # with ties
            "masks": torch.tensor(np.array(masks, bool).reshape(-1, height, width)),
        }
        samples.append({"img_id": image["id"], "ori_shape": (height, width), "pred_instances": instances})
    return samples


@pytest.mark.parametrize("seed", [0, 1])
def test_faster_coco_metric_is_pycocotools(small_digits, seed, tmp_path):
    pytest.importorskip("faster_coco_eval")
    from mmdet.evaluation import CocoMetric
    from mmdet.evaluation.metrics.faster_coco_metric import FasterCocoMetric

    annotations = small_digits / "annotations/instances_val.json"
    samples = _detections(annotations, seed)
    for what in ("bbox", "segm"):  # one by one: mmdet calls the numbers of a class the same for both
        theirs, ours = {}, {}
        for kind, results in ((CocoMetric, theirs), (FasterCocoMetric, ours)):
            metric = kind(
                ann_file=str(annotations), metric=what, metric_items=TWELVE, classwise=True,
                outfile_prefix=str(tmp_path / kind.__name__),
            )  # fmt: skip
            metric.dataset_meta = {"classes": NAMES["det"]}
            metric.process({}, samples)
            results.update(metric.evaluate(len(samples)))
        assert set(theirs) == {f"coco/{what}_{item}" for item in TWELVE} | {f"coco/{n}_precision" for n in NAMES["det"]}
        assert 0.1 < theirs[f"coco/{what}_mAP"] < 0.9
        np.testing.assert_equal(ours, theirs)  # NaN, of a size or class that does not occur, equals NaN
        _compare_unrounded(annotations, str(tmp_path / f"CocoMetric.{what}.json"), what)


def _compare_unrounded(annotations, predictions, kind):
    """Compare the very numbers: mmdet rounds them to three digits."""
    import faster_coco_eval
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    evaluations = []
    for reader, evaluation in (
        (COCO, COCOeval),
        (faster_coco_eval.COCO, faster_coco_eval.COCOeval_faster),
    ):
        truth = reader(str(annotations))
        result = evaluation(truth, truth.loadRes(predictions), kind)
        result.evaluate()
        result.accumulate()
        result.summarize()
        evaluations.append(result)
    slow, fast = evaluations
    assert len(slow.stats) == 12
    assert np.abs(np.array(slow.stats) - np.array(fast.stats)[:12]).max() < 1e-12
    assert np.abs(slow.eval["precision"] - fast.eval["precision"]).max() < 1e-12
    assert np.abs(slow.eval["recall"] - fast.eval["recall"]).max() < 1e-12


def test_mean_iou_is_a_count(small_digits):
    """As on ADE20K: label 0 is not counted, classes begin at 1 in the files."""
    import cv2
    from mmseg.evaluation import IoUMetric

    rng = np.random.default_rng(0)
    metric = IoUMetric(iou_metrics=["mIoU"], ignore_index=255)
    metric.dataset_meta = {"classes": NAMES["seg"]}
    count = len(NAMES["seg"])
    both, either_pred, either_true, right, counted = (np.zeros(count), np.zeros(count), np.zeros(count), 0, 0)
    for path in sorted((small_digits / "labels/val").iterdir()):
        truth = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        truth = np.where(truth == 0, 255, truth.astype(int) - 1)
        guess = np.where(
            rng.random(truth.shape) < 0.3, rng.integers(0, count, truth.shape), np.minimum(truth, count - 1)
        )
        metric.process({}, [{"pred_sem_seg": {"data": torch.tensor(guess)[None]},
                             "gt_sem_seg": {"data": torch.tensor(truth)[None]}}])  # fmt: skip
        valid = truth != 255
        for label in range(count):
            mine, real = (guess == label) & valid, (truth == label) & valid
            both[label] += (mine & real).sum()
            either_pred[label] += mine.sum()
            either_true[label] += real.sum()
        right, counted = right + ((guess == truth) & valid).sum(), counted + valid.sum()
    result = metric.evaluate(12)
    iou = both / (either_pred + either_true - both)
    assert result["mIoU"] == pytest.approx(100 * np.nanmean(iou), abs=0.00501)  # mmseg rounds to two digits
    assert result["mAcc"] == pytest.approx(100 * np.nanmean(both / either_true), abs=0.00501)
    assert result["aAcc"] == pytest.approx(100 * right / counted, abs=0.00501)
    assert 0.2 < np.nanmean(iou) < 0.9


def _test(monkeypatch, task, weights, data, work, *options, workers):
    """Run tools/test.py; return its metrics, what ``--out`` wrote, and its log."""
    out = work / ("labels" if task == "seg" else "out.pkl")
    settings = [f"test_dataloader.dataset.data_root={data}/", f"test_dataloader.num_workers={workers}",
                f"test_dataloader.persistent_workers={workers > 0}", "model.backbone.init_cfg=None"]  # fmt: skip
    if task == "det":
        settings += [f"test_evaluator.ann_file={data}/annotations/instances_val.json"]
    arguments = [digits_config(task), weights, "--work-dir", work, "--out", out, *options, "--cfg-options", *settings]
    monkeypatch.setattr(sys, "argv", ["test.py", *map(str, arguments)])
    script("tools/test.py").main()
    (metrics,) = work.glob("*/*.json")
    (log,) = work.glob("*/*.log")
    return json.loads(metrics.read_text().splitlines()[-1]), out, log.read_text()


def _tensors(value):
    """Return all numbers in what ``--out`` wrote, in order."""
    if isinstance(value, torch.Tensor):
        return [value.numpy().tobytes()]
    if isinstance(value, dict):
        return [leaf for key in sorted(value, key=str) for leaf in _tensors(value[key])]
    if isinstance(value, (list, tuple)):
        return [leaf for part in value for leaf in _tensors(part)]
    return [repr(value).encode()] if isinstance(value, (int, float, str, bytes)) else []


@pytest.mark.slow
@pytest.mark.parametrize("task", ["det", "seg", "cls"])
def test_the_same_checkpoint_gives_the_same_numbers(monkeypatch, small_digits, tmp_path, task):
    """Twice, once with two workers: metrics, and what ``--out`` wrote for each picture, bit for bit."""
    weights = nano_checkpoint(task, tmp_path)
    first, out, log = _test(monkeypatch, task, weights, small_digits, tmp_path / "a", "--per-class", workers=0)
    again, other, _ = _test(monkeypatch, task, weights, small_digits, tmp_path / "b", "--per-class", workers=2)
    times = ("time", "data_time")
    assert {k: v for k, v in first.items() if k not in times} == {k: v for k, v in again.items() if k not in times}
    images = sorted((small_digits / "images/val").iterdir())
    if task == "seg":
        names = [path.name for path in sorted(out.iterdir())]
        assert names == [path.with_suffix(".png").name for path in images]
        assert all((out / name).read_bytes() == (other / name).read_bytes() for name in names)
        assert "mIoU" in first and re.search(r"\|\s+background\s+\|", log)
        return
    answers = load(str(out))
    assert len(answers) == (len(images) if task == "det" else 20)
    assert _tensors(answers) == _tensors(load(str(other))) and len(_tensors(answers)) > len(answers)
    if task == "det":
        assert {"img_id", "pred_instances"} <= set(answers[0])
        assert set(answers[0]["pred_instances"]) == {"bboxes", "labels", "masks", "scores"}
        assert re.search(r"\| category\s+\| mAP", log)
    else:
        assert answers[0]["pred_score"].shape == (10,)
        rows = log.split("per class:\n")[1].splitlines()
        assert rows[0].split() == ["class", "precision", "recall", "f1-score", "support"]
        assert [row.split()[0] for row in rows[1:11]] == list(NAMES["cls"])
        assert sum(int(row.split()[-1]) for row in rows[1:11]) == 20


def test_a_table_of_the_classes():
    metrics = {"accuracy/top1": 50.0, "p/recall_classwise": [100.0, 0.5], "p/support_classwise": [3, 12]}
    assert class_table(metrics, "p", ["a", "a long name"]) == (
        "class           recall    support\n"
        "a               100.00          3\n"
        "a long name       0.50         12"
    )  # fmt: skip
    assert class_table(metrics, "other", []) is None


def test_per_class_of_an_evaluator_without_numbers_of_classes(tmp_path):
    (tmp_path / "a.pth").touch()
    cfg = Config(dict(default_scope="mmdet", test_evaluator=dict(type="DumpProposals")))
    with pytest.raises(ConfigError, match="--per-class: test_evaluator is DumpProposals, expected CocoMetric"):
        prepare_testing(cfg, str(tmp_path / "a.pth"), per_class=True)
    cfg = Config(dict(default_scope="mmdet", test_evaluator=[dict(type="mmdet.FasterCocoMetric")]))
    prepare_testing(cfg, str(tmp_path / "a.pth"), per_class=True)
    assert cfg.test_evaluator[0].classwise is True
