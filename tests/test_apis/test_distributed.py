"""Joining the processes of a distributed run: what is refused, and what is written into the config."""

from __future__ import annotations

import copy
import os
from unittest import mock

import pytest

pytest.importorskip("mmengine")

import torch
from mmengine.config import Config

from mmvmamba.apis import distributed
from mmvmamba.apis.distributed import check_same_start, join_processes
from mmvmamba.errors import CheckpointError, ConfigError

_NAMES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE",
    "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID",
)  # fmt: skip
TORCHRUN = dict(RANK="3", WORLD_SIZE="4", LOCAL_RANK="3", MASTER_ADDR="10.0.0.1", MASTER_PORT="29500")
SLURM = dict(SLURM_PROCID="3", SLURM_NTASKS="4", SLURM_LOCALID="1", MASTER_ADDR="10.0.0.1", MASTER_PORT="20007")


@pytest.fixture(autouse=True)
def environment():
    """Nothing of a launcher; returns a function that sets variables. What the code itself sets is undone, too."""
    with mock.patch.dict(os.environ):
        for name in _NAMES:
            os.environ.pop(name, None)
        yield os.environ.update


@pytest.fixture
def joined(monkeypatch):
    """What ``init_process_group`` is called with."""
    calls = []
    monkeypatch.setattr(distributed.torch_dist, "init_process_group", lambda *a, **k: calls.append((a, k)))
    return calls


def _on(monkeypatch, device, gpus=0):
    monkeypatch.setattr(distributed, "get_device", lambda: device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", mock.Mock())


@pytest.mark.parametrize("missing", TORCHRUN)
def test_variables_that_are_missing(environment, joined, missing):
    environment({name: value for name, value in TORCHRUN.items() if name != missing})
    with pytest.raises(ConfigError, match=rf"^--launcher pytorch: {missing} not set, .* tools/dist_train\.sh"):
        join_processes(Config(dict(launcher="pytorch")))
    assert joined == []


def test_variables_that_are_no_numbers(environment, joined):
    environment({**TORCHRUN, "RANK": "first", "MASTER_PORT": "-1"})
    with pytest.raises(ConfigError, match=r"^--launcher: RANK='first', MASTER_PORT='-1', expected whole numbers"):
        join_processes(Config(dict(launcher="pytorch")))


@pytest.mark.parametrize("missing", SLURM)
def test_slurm_variables_that_are_missing(environment, joined, missing):
    environment({name: value for name, value in SLURM.items() if name != missing})
    with pytest.raises(ConfigError, match=rf"^--launcher slurm: {missing} not set, .* tools/slurm_train\.sh"):
        join_processes(Config(dict(launcher="slurm")))


def test_a_process_that_does_not_know_of_the_others(environment):
    """As with torchrun, when --launcher pytorch was forgotten: all would write into one work dir."""
    environment(TORCHRUN)
    with pytest.raises(ConfigError, match=r"this is process 3 of 4, .* Add --launcher pytorch"):
        join_processes(Config(dict(launcher="none")))
    environment({"WORLD_SIZE": "1"})
    join_processes(Config(dict(launcher="none")))


def test_more_processes_than_gpus(environment, joined, monkeypatch):
    environment(TORCHRUN)
    _on(monkeypatch, "cuda", gpus=2)
    with pytest.raises(ConfigError, match=r"^process 4 of this node has no GPU, .*: 2 are visible. Start with 2 "):
        join_processes(Config(dict(launcher="pytorch")))
    assert joined == []


def test_on_gpus(environment, joined, monkeypatch):
    environment(TORCHRUN)
    _on(monkeypatch, "cuda", gpus=4)
    cfg = Config(dict(launcher="pytorch", env_cfg=dict(dist_cfg=dict(backend="nccl", timeout=77))))
    before = copy.deepcopy(cfg.to_dict())
    join_processes(cfg)
    ((arguments, options),) = joined
    assert arguments == ("nccl",) and options["timeout"].total_seconds() == 77
    torch.cuda.set_device.assert_called_once_with(3)
    assert cfg.to_dict() == before  # the model is wrapped as MMEngine does it


def test_on_cpus(environment, joined, monkeypatch):
    environment(TORCHRUN)
    _on(monkeypatch, "cpu")
    cfg = Config(dict(launcher="pytorch", find_unused_parameters=True, env_cfg=dict(dist_cfg=dict(backend="nccl"))))
    join_processes(cfg)
    assert joined[0][0] == ("gloo",)
    assert cfg.model_wrapper_cfg == dict(
        type="MMDistributedDataParallel", broadcast_buffers=False, find_unused_parameters=True, device_ids=None
    )  # fmt: skip
    cfg = Config(dict(launcher="pytorch", model_wrapper_cfg=dict(type="Own", static_graph=True)))
    join_processes(cfg)
    assert cfg.model_wrapper_cfg == dict(type="Own", static_graph=True, device_ids=None)


def test_synchronised_norms_on_cpus(environment, joined, monkeypatch):
    environment(TORCHRUN)
    norm = dict(type="SyncBN", requires_grad=True)
    for device, expected in (("cuda", "SyncBN"), ("cpu", "BN")):
        _on(monkeypatch, device, gpus=4)
        cfg = Config(dict(launcher="pytorch", model=dict(head=dict(norm_cfg=norm), necks=[dict(norm_cfg=norm), 3])))
        join_processes(cfg)
        assert cfg.model.head.norm_cfg == cfg.model.necks[0].norm_cfg == dict(type=expected, requires_grad=True)


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        (None, dict(type="MMDistributedDataParallel", broadcast_buffers=False, find_unused_parameters=False,
                    device_ids=None)),
        (dict(type="mmvmamba.FSDPStrategy", state_dict_cfg="full"),
         dict(type="MMFullyShardedDataParallel", device_id="cpu")),
    ],
)  # fmt: skip
def test_other_runner_on_cpus(environment, joined, monkeypatch, strategy, expected):
    environment(TORCHRUN)
    _on(monkeypatch, "cpu")
    cfg = Config(dict(launcher="pytorch", runner_type="FlexibleRunner", strategy=strategy))
    join_processes(cfg)
    assert cfg.strategy.model_wrapper == expected
    if strategy is not None:
        assert cfg.strategy.state_dict_cfg.state_dict_config.offload_to_cpu is False


def test_averages_of_a_sharded_model_are_refused():
    cfg = Config(dict(strategy=dict(type="mmvmamba.FSDPStrategy"), custom_hooks=[dict(type="mmpretrain.EMAHook")]))
    with pytest.raises(ConfigError, match="EMAHook and strategy is FSDPStrategy, expected one of them"):
        join_processes(cfg)


def test_sharding_without_a_launcher_is_refused():
    with pytest.raises(ConfigError, match="strategy is FSDPStrategy and --launcher is 'none', expected a launcher"):
        join_processes(Config(dict(launcher="none", strategy=dict(type="mmvmamba.FSDPStrategy"))))


def test_slurm_on_several_nodes(environment, joined, monkeypatch):
    environment(SLURM)
    _on(monkeypatch, "cpu")
    cfg = Config(dict(launcher="slurm"))
    with mock.patch("subprocess.getoutput", side_effect=AssertionError("a shell")):
        join_processes(cfg)
    assert cfg.launcher == "pytorch"
    assert [distributed.os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] == ["3", "4", "1"]
    assert "store" not in joined[0][1]


def test_slurm_on_one_node_listens_on_the_loopback_address(environment, joined, monkeypatch):
    stores = mock.Mock()
    monkeypatch.setattr(distributed, "loopback_store", stores.server)
    monkeypatch.setattr(distributed, "TCPStore", stores.client)
    _on(monkeypatch, "cpu")
    for rank, store in (("0", stores.server), ("1", stores.client)):
        environment({**SLURM, "SLURM_PROCID": rank, "MASTER_ADDR": "127.0.0.1"})
        join_processes(Config(dict(launcher="slurm")))
        assert joined[-1][1]["store"] is store.return_value
        assert (joined[-1][1]["rank"], joined[-1][1]["world_size"]) == (int(rank), 4)
    assert stores.server.call_count == stores.client.call_count == 1


def _as_if(monkeypatch, own, other):
    """Process 0 has ``own``, process 1 ``other``; return what process 0 raises."""
    seen = []
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(distributed.dist, "all_reduce", lambda data, op: None)
    monkeypatch.setattr(distributed.dist, "all_gather", lambda data: seen.append(data.clone()) or [data, data])
    check_same_start(Config(other))
    monkeypatch.setattr(distributed.dist, "all_gather", lambda data: [data, seen[0]])
    check_same_start(Config(own))


def test_processes_start_from_the_same_checkpoint(monkeypatch, tmp_path):
    here, there = dict(load_from="a/iter_4.pth", resume=True), dict(load_from="/b/iter_4.pth", resume=True)
    _as_if(monkeypatch, here, there)  # each node may have it at another place
    _as_if(monkeypatch, {}, {})
    for other in ({}, dict(load_from="a/iter_6.pth", resume=True), dict(load_from="a/iter_4.pth")):
        with pytest.raises(CheckpointError, match=r"process 0 from iter_4.pth \(resumed\), processes \[1\] from "):
            _as_if(monkeypatch, here, other)
    for folder, digest in (("one", "0" * 64), ("two", "1" * 64)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "iter_4.pth").write_bytes(b"x")
        (tmp_path / folder / "iter_4.pth.json").write_text(
            f'{{"format": 1, "file": "iter_4.pth", "sha256": "{digest}", "size": 1}}'
        )
    one, two = (dict(load_from=str(tmp_path / name / "iter_4.pth")) for name in ("one", "two"))
    with pytest.raises(CheckpointError, match=r"iter_4.pth \(its weights\), sha256 0000"):
        _as_if(monkeypatch, one, two)
