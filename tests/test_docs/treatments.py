"""What is done with every code block of the documents, and why not more where it is not run.

A block belongs to the one treatment of its page whose key its text contains. A block without a treatment, one with two,
and a treatment without a block fail ``test_commands.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Run:
    """Shell lines, each run as it stands in a prepared folder.

    Attributes:
        replace: Text of the block -> what stands there instead, such as another model.
        needs: Files that must be there first; ``page.py`` knows how to make them.
        leaves: Files or folders that must be there afterwards.
        prints: Texts that the lines must have printed.
    """

    replace: Mapping[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    leaves: tuple[str, ...] = ()
    prints: tuple[str, ...] = ()


@dataclass(frozen=True)
class Python:
    """Python that is executed in the prepared folder, in a namespace of its own. Attributes as in ``Run``."""

    replace: Mapping[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Write:
    """Python whose first line names the file that it is: written there for the blocks that follow."""


@dataclass(frozen=True)
class Config:
    """A config: written, read by ``load_config`` and, unless it is too large for that, its model is built.

    Attributes:
        file: Where to write it, if its first line does not say so.
        nano: What makes its network small, written behind it; None leaves it as a config that is only read.
    """

    file: str | None = None
    nano: str | None = ""


@dataclass(frozen=True)
class Dry:
    """Shell lines that are not run: the tool is there and its own parser takes the arguments.

    Attributes:
        reason: Why it cannot be run here.
    """

    reason: str


@dataclass(frozen=True)
class Output:
    """A line that begins with ``$`` and what it printed: run, and compared with what stands there."""


@dataclass(frozen=True)
class By:
    """Run by another test.

    Attributes:
        test: ``file::function``, or a file.
    """

    test: str


@dataclass(frozen=True)
class Shown:
    """No command: something to look at.

    Attributes:
        what: What it is.
    """

    what: str


Treatment = Run | Python | Write | Config | Dry | Output | By | Shown

COCO = "needs COCO, ADE20K or ImageNet"
NETWORK = "fetches files from the network"
INSTALLS = "installs packages, which takes minutes and the network; scripts/check_wheel.sh and .ci/run do it"
CLUSTER = "needs several machines, GPUs or Slurm; tests/test_tools/test_launchers.py runs the launchers with stand-ins"

_CONFIG_OF_PAGE = Config(
    nano="""
model["backbone"].update(arch="nano", init_cfg=None)
model["neck"]["in_channels"] = [32, 64, 128, 256]
"""
)
_CLASSIFIER = "configs/cls/digits/vmamba-nano_digits.py"
_DETECTOR = '"configs/det/digits/mask-rcnn_vmamba-nano_fpn_digits.py", "work_dirs/demo/det/iter_800.pth"'
#: cpu_speed.md: the same lines at small sizes and once.
_ONCE = {"rounds=15": "rounds=1", "rounds=6": "rounds=1", "rounds=3": "rounds=1", "range(40)": "range(1)",
         '"tiny-s1l8"': '"nano"', "3, 512, 512": "3, 64, 64", "3, 224, 224": "3, 64, 64"}  # fmt: skip
_QUICK_DEMO = {"data/digits-quick": "data/digits", "work_dirs/demo-quick/det/iter_6": "work_dirs/demo/det/iter_800",
               "work_dirs/demo-quick/seg/iter_6": "work_dirs/demo/seg/iter_2000"}  # fmt: skip

#: Page -> part of a block's text -> its treatment; the empty text stands for every block of the page.
TREATMENTS: dict[str, dict[str, Treatment]] = {
    "README.md": {
        "make demo": Dry("takes minutes; tests/test_demo.py runs the quick demo"),
        "metric (0 to 1)": Shown("what the demo prints"),
        "# my_config.py": By("tests/test_readme.py::test_own_mmdet_config"),
        "demo/app.py": Dry("docs/tutorials/deploy.md and paper_figures.md run such lines"),
        "python tools/check_dataset.py configs/det/vmamba": Dry(COCO),
        "python tools/convert_checkpoint.py": Dry(
            "the official file; docs/migrate_from_vmamba.md runs it on one like it"
        ),
        "from mmvmamba.converters import": By("tests/test_readme.py::test_python_examples"),
        "from mmvmamba.ops import": By("tests/test_readme.py::test_python_examples"),
        "pip install torch": Dry(INSTALLS),
        "MMVMAMBA_WITH_CUDA=1": Dry(INSTALLS),
        "MMCV_WITH_OPS=1": Dry(INSTALLS),
    },
    "docs/backends.md": {"": Python()},
    "docs/checkpoints.md": {
        "read_checkpoint": Python(needs=("epoch_12.pth",)),
        "OFFICIAL OURS.safetensors": Dry("stands for any file; docs/migrate_from_vmamba.md runs both lines"),
        "https://example.org": Python(),
    },
    "docs/concepts.md": {"": Python()},
    "docs/cpu_speed.md": {"": Python(replace=_ONCE)},
    "docs/data.md": {
        "--policy skip": Run(
            replace={"CONFIG": "configs/det/digits/mask-rcnn_vmamba-nano_fpn_digits.py --no-pictures"}
        ),
        "--ade20k": Dry(COCO),
        "instances_train2017.json\n": Shown("a layout of files"),
        '"annotations": [': Shown("an annotation file"),
        "ADE_train_00000001.jpg": Shown("a layout of files"),
        "n01440764_10026": Shown("a layout of files"),
        "categories alone": Shown("printed by python -m benchmarks.dataset_check in about a minute"),
    },
    "docs/distributed.md": {
        "make install": Dry(CLUSTER),
        "tools/dist_test.sh": Dry(CLUSTER),
        "data/digits": Dry("two processes for a minute; tests/test_engine/test_distributed_digits.py trains so"),
        "NNODES=2": Dry(CLUSTER),
        "MAX_RESTARTS=3": Dry(CLUSTER),
        "slurm_train": Dry(CLUSTER),
        "accumulative_counts": Dry(CLUSTER),
        "fsdp.py": Config(file="configs/det/own_data/with_fsdp.py", nano=None),
    },
    "docs/faq.md": {
        "pip install -v": Dry(INSTALLS),
        "available_backends": Python(),
        "huggingface": Python(),
        "get_flops": Run(prints=("multiply-add",)),
        "FAMILIES": Python(),
        "make demo": Dry(f"takes minutes (tests/test_demo.py), and the second {NETWORK}"),
    },
    "docs/get_started.md": {
        "make demo": Dry("takes minutes; tests/test_demo.py runs the quick demo"),
        "pip install torch": Dry(INSTALLS),
        "available_backends": Python(),
        'VMamba("nano")': Python(),
        "# my_config.py": _CONFIG_OF_PAGE,
        "demo/image_demo.py": Run(replace=_QUICK_DEMO, leaves=("work_dirs/pictures/vis", "work_dirs/labels/vis")),
    },
    "docs/inference.md": {
        "street.jpg holiday/": Dry(f"the first {NETWORK}, the second is any config; get_started.md runs the tool"),
        "import cv2": Python(
            replace={'"mask-rcnn_vmamba-tiny-s1l8_fpn_1x_coco"': _DETECTOR, "cuda:0": "cpu"},
            needs=("street.jpg", "holiday/one.jpg"),
        ),
        "tools/test.py": Dry("the form of the arguments; tutorials/finetune.md runs the tool"),
    },
    "docs/migrate_from_mamba_ssm.md": {
        "selective_scan": Python(),
        "import ssd": Python(),
        "causal_conv1d": Python(),
        "vim_t_midclstok": Run(needs=("vim_t_midclstok_76p1acc.pth",), leaves=("vim-tiny.safetensors",)),
    },
    "docs/migrate_from_vmamba.md": {
        "MM_VSSM": Shown("a config of upstream's"),
        "# my_config.py": _CONFIG_OF_PAGE,
        "stage_channels": Python(),
        "backbone = from_upstream": Python(),
        "tools/convert_checkpoint.py": Run(
            needs=("vssm1_tiny_0230s_ckpt_epoch_264.pth",),
            leaves=("vmamba-tiny-s1l8.safetensors", "back_to_upstream.pth"),
        ),
        "to_upstream_state_dict": Python(),
    },
    "docs/model_zoo.md": {
        "slide_memory": Dry("a minute; tests/test_benchmarks/test_slide_memory.py has the same numbers"),
        "mim search": Shown("lines for mim, which is not installed here"),
        "--cfg-options": Dry(f"{COCO}, and {NETWORK}"),
        "load_from =": Python(),
        "OFFICIAL.pth OURS": Dry("stands for any file; docs/migrate_from_vmamba.md runs both lines"),
    },
    "docs/own_data.md": {"": By("tests/test_docs/test_own_data.py")},
    "docs/scaling.md": {"": Output()},
    "docs/tutorials/deploy.md": {
        "--part backbone-neck\n": Run(
            leaves=("work_dirs/export/mask-rcnn_vmamba-nano_fpn_digits_backbone-neck_torch.pt2",)
        ),
        "--part segmentor": Run(
            leaves=(
                "work_dirs/export/vmamba-nano_upernet_digits_segmentor_torch.pt2",
                "work_dirs/export/vmamba-nano_digits_classifier_onnx.onnx",
            )
        ),
        "torch.export.load": Python(),
        "onnxruntime": Python(),
        "test_exported.py": Run(prints=("coco/bbox_mAP",)),
        "--int8": Run(leaves=("work_dirs/export/vmamba-nano_digits_classifier_int8_torch.pt2",)),
        "fold_batch_norms": Python(),
        "demo/app.py": Dry("waits for a browser; tests/test_app opens the page in one"),
    },
    "docs/tutorials/finetune.md": {
        "digits.py --out": Run(leaves=("data/digits/crops",)),
        "work_dirs/classifier\n": Run(leaves=("work_dirs/classifier/iter_2000.pth",)),
        "work_dirs/detector": Run(leaves=("work_dirs/detector/iter_800.pth",)),
        "frozen_stages=2": Run(leaves=("work_dirs/frozen/iter_800.pth",)),
        "layer_decay_rate": Run(leaves=("work_dirs/layers/iter_800.pth",)),
        "check_weights": Python(),
    },
    "docs/tutorials/own_backbone.md": {
        "# spiral_net.py": Write(),
        "from spiral_net": Python(),
        "# spiral_digits.py": Config(),
        "digits.py --out": Run(leaves=("work_dirs/spiral/iter_2000.pth",)),
        "get_flops": Run(prints=("multiply-add",)),
    },
    "docs/tutorials/own_operator.md": {"": Python()},
    "docs/tutorials/paper_figures.md": {
        "get_flops": Run(prints=("multiply-add",), leaves=("work_dirs/get_flops/get_flops.png",)),
        "benchmark.py": Run(
            replace={"vmamba-tiny-s1l8_8xb128_in1k": _CLASSIFIER, "--quick": "--seconds 1 --shape 64 64"},
            leaves=("work_dirs/benchmark/benchmark.png",),
        ),
        "/scaling.py": Run(
            replace={"--quick": f"{_CLASSIFIER} --sides 64 96 --seconds 1"}, leaves=("work_dirs/scaling/scaling.png",)
        ),
        "accuracy_scaling.py": Run(
            replace={"--quick": "--sizes 96 --data-root data/digits"},
            leaves=("work_dirs/accuracy_scaling/accuracy_scaling.png",),
        ),
        "erf.py": Run(replace={"--quick": "--limit 1 --shape 64 96"}, leaves=("work_dirs/erf/erf.png",)),
        "scan_maps.py": Run(leaves=("work_dirs/scan_maps/scan_maps.png",)),
        "scan_routes.py": Run(leaves=("work_dirs/scan_routes/scan_routes.gif",)),
        "cam.py": Run(leaves=("work_dirs/cam/cam.png",)),
    },
}
