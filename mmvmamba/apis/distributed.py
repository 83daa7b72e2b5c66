"""Starting the processes of a distributed run, on GPUs or, with gloo, on CPUs.

MMEngine's own start needs a GPU, and under Slurm runs a text of the environment in a shell. ``build_runner`` calls
``join_processes`` first; MMEngine then finds the process group that is there.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from mmengine import dist
from mmengine.config import Config, ConfigDict
from mmengine.device import get_device
from mmengine.logging import print_log
from torch import distributed as torch_dist
from torch.distributed import TCPStore  # type: ignore[attr-defined] # exported, but not by name

from mmvmamba.apis.class_names import class_name
from mmvmamba.checkpoints.manifest import read_manifest
from mmvmamba.errors import CheckpointError, ConfigError
from mmvmamba.loopback import ADDRESS, loopback_store

_HOW = "Start with tools/dist_train.sh, tools/dist_test.sh or their slurm_*.sh"
_NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
#: What Slurm calls the three numbers of a process.
_SLURM = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}
#: Seconds that a process waits for the others before it gives up, unless env_cfg.dist_cfg.timeout says otherwise.
_TIMEOUT = 1800
#: FSDP's "full", but for offload_to_cpu: parameters that are on the CPU are freed under the state dict then, and
#: reading it crashes (PyTorch 2.11).
_FULL_WITHOUT_OFFLOAD = dict(
    state_dict_type="FULL_STATE_DICT",
    state_dict_config=dict(type="FullStateDictConfig", rank0_only=True, offload_to_cpu=False),
    optim_state_dict_config=dict(type="FullOptimStateDictConfig", rank0_only=True, offload_to_cpu=False),
)


def join_processes(cfg: Config) -> None:
    """Join the process group that ``cfg.launcher`` asks for, unless this process has, and adapt ``cfg`` to it.

    On a machine without an accelerator the backend is gloo and the model is wrapped without device numbers. ``mpi`` and
    accelerators other than CUDA are left to MMEngine.

    Args:
        cfg: A config with ``launcher``; changed in place.

    Raises:
        ConfigError: If the environment does not say which of how many processes this is, says it although
            ``launcher`` is "none", or there are more processes than GPUs; or if FSDP is combined with EMAHook or has no
            launcher.
    """
    _refuse_averages_of_shares(cfg)
    launcher = cfg.get("launcher", "none")
    if launcher == "none":
        _refuse_strangers()
        _refuse_shares_for_one(cfg)
        return
    device = get_device()
    if launcher not in ("pytorch", "slurm") or device not in ("cpu", "cuda"):
        return
    if not torch_dist.is_initialized():
        if launcher == "slurm":
            _translate_slurm()
        _check_environment(device)
        _join(cfg, device)
    cfg.launcher = "pytorch"  # under Slurm, too: the environment is that of torchrun now
    if device == "cpu":
        _wrap_without_devices(cfg)
        if replaced := _without_synchronised_norms(cfg.get("model")):
            text = f"{replaced} SyncBN of the config became BN: PyTorch has none for CPUs."
            print_log(text, logger="current", level=logging.WARNING)


def check_same_start(cfg: Config) -> None:
    """Raise if the processes are about to go on from different checkpoints, as after a copy that is not everywhere.

    Each process chooses by what it finds in the work dir, and reads its checkpoint itself. Nodes that do not share the
    folder would begin with different weights, which nothing makes equal later.

    Args:
        cfg: The config of this process, after ``prepare_training`` or ``prepare_testing``.

    Raises:
        CheckpointError: On all processes.
    """
    if dist.get_world_size() == 1:
        return
    source = cfg.get("load_from")
    description = "nothing" if source is None else _describe(source, resume=bool(cfg.get("resume")))
    digest = hashlib.sha256(description.encode()).digest()
    number = torch.tensor([int.from_bytes(digest[:7], "big")])
    differing = [rank for rank, other in enumerate(dist.all_gather(number)) if not torch.equal(other, number)]
    anywhere = torch.tensor([len(differing)])
    dist.all_reduce(anywhere, op="max")
    if int(anywhere):
        raise CheckpointError(
            f"the processes start from different checkpoints: process {dist.get_rank()} from {description}, processes "
            f"{differing} from others, expected the same for all. Put the work dir on a file system that all nodes "
            "share, or copy the checkpoint and its manifest to each of them."
        )


def _describe(source: str, *, resume: bool) -> str:
    what = f"{Path(source).name} ({'resumed' if resume else 'its weights'})"
    path = Path(source)
    manifest = read_manifest(path) if path.is_file() else None
    return what if manifest is None else f"{what}, sha256 {manifest.sha256}"


def _refuse_strangers() -> None:
    """Several processes that know nothing of each other would write into one work dir."""
    size = os.environ.get("WORLD_SIZE", "1")
    if "RANK" in os.environ and size.isdecimal() and int(size) > 1:
        raise ConfigError(
            f"--launcher is 'none', but the environment says that this is process {os.environ['RANK']} of {size}, "
            "expected 'pytorch': each would train alone and write over the others' files. Add --launcher pytorch, or "
            "unset RANK and WORLD_SIZE."
        )


def _strategy(cfg: Config) -> str:
    return class_name(cfg.get("strategy") or {})


def _refuse_shares_for_one(cfg: Config) -> None:
    if _strategy(cfg) == "FSDPStrategy":
        raise ConfigError(
            "strategy is FSDPStrategy and --launcher is 'none', expected a launcher: there is nobody to share with. "
            "Start with tools/dist_train.sh, for one GPU as well, or take the base with FSDP out of the config."
        )


def _refuse_averages_of_shares(cfg: Config) -> None:
    names = [class_name(hook) for hook in cfg.get("custom_hooks") or []]
    if _strategy(cfg) == "FSDPStrategy" and "EMAHook" in names:
        raise ConfigError(
            "custom_hooks has EMAHook and strategy is FSDPStrategy, expected one of them: the hook averages whole "
            "models, of which FSDP leaves each process a share. Remove the hook, or train with DDP."
        )


def _translate_slurm() -> None:
    """Say in torchrun's words what Slurm says in its own."""
    missing = [name for name in (*_SLURM.values(), "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise ConfigError(
            f"--launcher slurm: {', '.join(missing)} not set, expected to be in a job step of Slurm whose script sets "
            "MASTER_ADDR and MASTER_PORT. Start with tools/slurm_train.sh or tools/slurm_test.sh."
        )
    for name, theirs in _SLURM.items():
        os.environ[name] = os.environ[theirs]


def _check_environment(device: str) -> None:
    missing = [name for name in _NEEDED if not os.environ.get(name)]
    if missing:
        raise ConfigError(
            f"--launcher pytorch: {', '.join(missing)} not set, expected torchrun to have done so. {_HOW}, or drop "
            "--launcher for a single process."
        )
    wrong = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT") if not os.environ[name].isdecimal()]
    if wrong:
        found = ", ".join(f"{name}={os.environ[name]!r}" for name in wrong)
        raise ConfigError(f"--launcher: {found}, expected whole numbers. {_HOW}.")
    local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if device == "cuda" and local >= count:
        raise ConfigError(
            f"process {local + 1} of this node has no GPU, expected one for each: {count} are visible. Start with "
            f"{count} processes, or correct CUDA_VISIBLE_DEVICES."
        )


def _join(cfg: Config, device: str) -> None:
    settings: Mapping[str, Any] = (cfg.get("env_cfg") or {}).get("dist_cfg") or {}
    timeout = timedelta(seconds=settings.get("timeout", _TIMEOUT))
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    backend = "gloo" if device == "cpu" else settings.get("backend", "nccl")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if os.environ["MASTER_ADDR"] == ADDRESS and "TORCHELASTIC_USE_AGENT_STORE" not in os.environ:
        # Slurm on one node: nobody has made the store yet, and the first process would open it to the network.
        port = int(os.environ["MASTER_PORT"])
        store = loopback_store(port, timeout) if rank == 0 else TCPStore(ADDRESS, port, timeout=timeout)
        torch_dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    else:
        torch_dist.init_process_group(backend, timeout=timeout)


def _wrap_without_devices(cfg: Config) -> None:
    """Name the wrapper of the model and leave out the number of a GPU, which MMEngine would put in."""
    if cfg.get("runner_type", "Runner") == "Runner":
        cfg.model_wrapper_cfg = _without_devices(cfg, cfg.get("model_wrapper_cfg"))
        return
    strategy = cfg.get("strategy") or ConfigDict(type="DDPStrategy")
    name = _strategy(cfg) or "DDPStrategy"
    if name == "DDPStrategy":
        strategy["model_wrapper"] = _without_devices(cfg, strategy.get("model_wrapper"))
    elif name == "FSDPStrategy":
        wrapper = strategy.get("model_wrapper") or dict(type="MMFullyShardedDataParallel")
        strategy["model_wrapper"] = ConfigDict(wrapper, device_id="cpu")
        if strategy.get("state_dict_cfg") == "full":
            strategy["state_dict_cfg"] = ConfigDict(_FULL_WITHOUT_OFFLOAD)
    cfg.strategy = strategy


def _without_synchronised_norms(settings: Any) -> int:
    """Replace ``SyncBN`` by ``BN`` in the config of a model, in place; return how often."""
    if isinstance(settings, list):
        return sum(map(_without_synchronised_norms, settings))
    if not isinstance(settings, dict):
        return 0
    own = settings.get("type") in ("SyncBN", "mmcv.SyncBN")
    if own:
        settings["type"] = "BN"
    return own + sum(map(_without_synchronised_norms, settings.values()))


def _without_devices(cfg: Config, wrapper: Mapping[str, Any] | None) -> ConfigDict:
    if wrapper is None:  # as MMEngine's runner would
        unused = cfg.get("find_unused_parameters", False)
        wrapper = dict(type="MMDistributedDataParallel", broadcast_buffers=False, find_unused_parameters=unused)
    return ConfigDict(wrapper, device_ids=None)
