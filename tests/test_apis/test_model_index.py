"""The metafiles: every config is in them, every number is the published one, and nobody is left without an answer."""

from __future__ import annotations

import fnmatch
import gzip
import json
import re
import shutil
from pathlib import Path

import pytest

from mmvmamba.apis import model_index
from mmvmamba.apis.model_index import ModelEntry, find_model, index_root, list_models
from mmvmamba.errors import ConfigError
from mmvmamba.models.backbones import FAMILIES
from tests.test_apis.fact_sheet import fact_sheet, names_of_files, published, published_models, read_sheet

ROOT = Path(__file__).parents[2]
RELEASES = "https://github.com/MzeroMiko/VMamba/releases/download/"
ARCHS = tuple(published()["rows"])
RECIPES = {"fpn_1x": "1x", "fpn_ms-crop-3x": "3x"}


def config_files() -> list[Path]:
    """Every config of a model; those of the demo and of the user's own data describe none."""
    return [path for family in FAMILIES for path in sorted((ROOT / "configs").glob(f"*/{family}/*.py"))]


def family_of(entry: ModelEntry) -> str:
    return entry.config.parent.name


VMAMBA = [entry for entry in list_models() if family_of(entry) == "vmamba"]


def arch_of(entry: ModelEntry) -> str:
    """Return the variant that is part of a name."""
    return re.search(rf"vmamba-({'|'.join(ARCHS)})(?=_)", entry.name)[1]


def metrics_of(entry: ModelEntry, setting: str | None = None) -> dict[str, float]:
    return {k: v for result in entry.results if result.setting == setting for k, v in result.metrics.items()}


def expected_of(entry: ModelEntry) -> tuple[list[float] | None, list[float] | None, str | None]:
    """Return the published results, [M parameters, G FLOPs] and weights; None where nothing is published."""
    if family_of(entry) == "vmamba":
        results, cost, weights = expected_of_vmamba(entry)
        return results, cost, weights and RELEASES + weights
    model = published_models(family_of(entry))[entry.name]
    return list(model["metrics"].values()), model["cost"], model["weights"]


def expected_of_vmamba(entry: ModelEntry) -> tuple[list[float] | None, list[float] | None, str | None]:
    data, arch = published(), arch_of(entry)
    row = data["rows"][arch]
    if entry.task == "cls":
        return [row["top-1"]], row["cost"], data["weights"]["cls"][arch]
    if entry.task == "det":
        recipe = next((RECIPES[part] for part in RECIPES if f"mask-rcnn_vmamba-{arch}_{part}_" in entry.name), None)
        if recipe is None or entry.name.startswith("cascade"):
            return None, None, None
        return row[recipe], row["det cost"], data["weights"][recipe][arch]
    weights = data["weights"]["seg"].get(arch)
    if entry.name.endswith("-512x512-slide"):
        return None, None, weights
    if entry.name.endswith("-512x512"):
        return row["mIoU"], row["seg cost"], weights
    row = data["640x640"].get(arch, {}) if entry.name.endswith("-640x640") else {}
    return row.get("mIoU"), row.get("seg cost"), None


def test_every_config_is_a_model_and_every_model_has_its_config():
    models = list_models()
    assert sorted(entry.config for entry in models) == sorted(config_files())
    for entry in models:
        assert entry.name == entry.config.stem
        assert entry.config.relative_to(ROOT / "configs").parts[0] == entry.task
    assert len({entry.name for entry in models}) == len(models) >= 41


@pytest.mark.parametrize("entry", list_models(), ids=lambda entry: entry.name)
def test_every_number_is_the_published_one(entry):
    results, cost, weights = expected_of(entry)
    assert list(metrics_of(entry).values()) == (results or [])
    given = [entry.metadata.get("Published Parameters (M)"), entry.metadata.get("Published FLOPs (G)")]
    assert given == (cost or [None, None])
    assert entry.weights == weights
    assert entry.converted_weights is None  # until somebody hosts them
    assert all(result.source == "published by upstream" for result in entry.results)  # until we trained one


def test_metrics_have_the_names_of_their_tasks():
    names = {task: {name for entry in list_models(task) for name in metrics_of(entry)} for task in model_index.TASKS}
    assert names == {"cls": {"Top 1 Accuracy"}, "det": {"box AP", "mask AP"}, "seg": {"mIoU", "mIoU(ms+flip)"}}


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "vmamba"])
def test_a_family_has_a_model_for_everything_published_and_its_numbers_are_in_the_fact_sheet(family):
    models = published_models(family)
    listed = {entry.name: entry for entry in list_models() if family_of(entry) == family}
    assert set(models) == set(listed)
    assert {entry.task for entry in listed.values()} >= {"cls", "seg"}  # nobody published a detector of HRVMamba
    for name, model in models.items():
        assert set(metrics_of(listed[name])) == set(model["metrics"])
    sheet = fact_sheet(family)
    if sheet is None:
        pytest.skip("the fact sheet is not beside this checkout")
    # The key lists of official checkpoints repeat upstream's tables, which the sheet has with more digits at times.
    lists = [gzip.decompress(path.read_bytes()).decode() for path in (ROOT / "tests/data/parity" / family).glob("*.gz")]
    tables = [json.dumps(json.loads(text)["published"]) for text in lists]
    numbers = set(re.findall(r"\d+(?:\.\d+)?|(?<!\d)\.\d+", " ".join([sheet.read_text(), *tables])))
    told = [n for model in models.values() for n in (*model["metrics"].values(), *(model["cost"] or ()))]
    assert told and not [n for n in told if not {f"{n:g}", f"{n:.1f}", f"{n:.3f}"} & numbers]


def test_every_row_of_the_sheet_has_its_model():
    listed = {(entry.task, arch_of(entry)) for entry in VMAMBA if entry.results}
    for arch, row in published()["rows"].items():
        assert ("cls", arch) in listed
        assert (("det", arch) in listed) == (row["1x"] is not None)
        assert (("seg", arch) in listed) == (row["mIoU"] is not None)
        speeds = find_model(f"vmamba-{arch}_8xb128_in1k").metadata
        kinds = ("Published Throughput (A100,images/s)", "Published Training Throughput (A100,images/s)")
        assert [speeds[kind] for kind in kinds] == row["images/s"]


def test_the_second_result_of_the_base_detector():
    entry = find_model("mask-rcnn_vmamba-base-s2l15_fpn_1x_coco")
    row = published()["rows"]["base-s2l15"]
    assert list(metrics_of(entry, "total batch size 8").values()) == row["1x, batch 8"]
    # mim shows one value per data set and metric, the last.
    assert [result.setting for result in entry.results[-2:]] == [None, None]


def test_our_copy_of_the_published_numbers_is_that_of_the_fact_sheet():
    sheet = fact_sheet()
    if sheet is None:
        pytest.skip("the fact sheet is not beside this checkout")
    text = sheet.read_text()
    assert read_sheet(text) == published()["rows"]
    copied = {name.split("/")[1] for files in published()["weights"].values() for name in files.values()}
    for name in names_of_files(text):
        assert fnmatch.filter(copied, name.replace("...", "*")), name


def test_find_model_by_name_and_task():
    entry = find_model("retinanet_vmamba-tiny-s1l8_fpn_1x_coco", "det")
    assert (entry.task, entry.weights, entry.results) == ("det", None, ())
    assert find_model(entry.name) == entry
    assert all(each.task == "seg" for each in list_models("seg"))


@pytest.mark.parametrize(
    ("name", "task", "told"),
    [
        ("vmamba-tiny", "seg", "'vmamba-tiny-s1l8_upernet_4xb4-160k_ade20k-512x512'"),
        ("mask-rcnn_vmamba-tiny-s1l8_fpn_1x_cocco", None, "'mask-rcnn_vmamba-tiny-s1l8_fpn_1x_coco'"),
        ("VMamba-Tiny-S1L8", "cls", "'vmamba-tiny-s1l8_8xb128_in1k'"),
        ("vmamba-tiny-s1l8_8xb128_in1k", "det", "is one of task 'cls', expected one of 'det'"),
        ("resnet50", None, "expected the name of a model: the stem of a file in configs/"),
        ("", None, "such as"),
    ],
)
def test_an_unknown_model_is_answered_with_the_nearest(name, task, told):
    with pytest.raises(ConfigError, match=re.escape(told)):
        find_model(name, task)


def test_an_unknown_task_is_refused():
    with pytest.raises(ConfigError, match="task is 'detection', expected one of cls, det, seg"):
        find_model("x", "detection")


@pytest.fixture
def copied(tmp_path, monkeypatch) -> Path:
    """A copy of the metafiles laid out as in a wheel, which the index now reads; its root."""
    root = tmp_path / "mmvmamba" / ".mim"
    for path in [ROOT / "model-index.yml", *(ROOT / "configs").rglob("metafile.yml")]:
        (root / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, root / path.relative_to(ROOT))
    monkeypatch.setattr(model_index, "_PACKAGE", tmp_path / "mmvmamba")
    return root


def test_a_wheel_has_its_own_index(copied):
    assert index_root() == copied
    assert find_model("vmamba-tiny-s1l8_8xb128_in1k").config.is_relative_to(copied)


def test_links_of_a_checkout_lead_to_its_own_files(copied, tmp_path):
    """setup.py makes them; an error about a config must name the file that the user edits."""
    shutil.move(copied, tmp_path / "there")
    copied.mkdir()
    for name in ("configs", "model-index.yml"):
        (copied / name).symlink_to(tmp_path / "there" / name)
    assert index_root() == tmp_path / "there"


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("Task: det", "Task: detection", "Task of 'mask-rcnn_vmamba-tiny-s1l8_fpn_1x_coco' is 'detection'"),
        ("Source: published by upstream", "Source: a friend", "Source of a result of"),
        ("        Source: published by upstream\n", "", "Source is None, expected a text"),
        ("Name: mask", "name: mask", "Name is None, expected a text"),
        ("Models:", "Modells:", "Models is NoneType, expected a list"),
        ("Models:", "Models: [", "it is no YAML"),
        ("          box AP: 47.3\n", "", "expected Task, Dataset, Metrics and Source"),
    ],
)
def test_a_malformed_metafile_is_named(copied, old, new, told):
    file = copied / "configs" / "det" / "vmamba" / "metafile.yml"
    file.write_text(file.read_text().replace(old, new, 1))
    with pytest.raises(ConfigError, match=re.escape(told)) as caught:
        list_models()
    assert str(file) in str(caught.value) and "Correct the file" in str(caught.value)


def test_what_is_missing_is_named(copied):
    (copied / "configs" / "seg" / "vmamba" / "metafile.yml").unlink()
    with pytest.raises(ConfigError, match=r"seg/vmamba/metafile.yml' cannot be read"):
        list_models()
    (copied / "model-index.yml").unlink()
    with pytest.raises(ConfigError, match=r"found no model-index.yml in .* Install mmvmamba again"):
        list_models()
