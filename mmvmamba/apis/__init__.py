"""What the command lines in ``tools/`` do, importable."""

from mmvmamba.apis.data import check_data
from mmvmamba.apis.failures import run_command, train
from mmvmamba.apis.inferencers import Inferencer, inferencer
from mmvmamba.apis.runner import add_shared_arguments, build_runner, load_config, prepare_testing, prepare_training
from mmvmamba.apis.weights import check_weights

__all__ = [
    "Inferencer",
    "add_shared_arguments",
    "build_runner",
    "check_data",
    "check_weights",
    "inferencer",
    "load_config",
    "prepare_testing",
    "prepare_training",
    "run_command",
    "train",
]
