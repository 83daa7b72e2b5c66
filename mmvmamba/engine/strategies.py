"""MMEngine's strategy for FSDP, able to resume; imported only where a config names it, as MMEngine's part is large."""

from __future__ import annotations

from typing import Any

from mmengine._strategy import FSDPStrategy as MMEngineFSDPStrategy
from torch.distributed.fsdp import FullyShardedDataParallel

from mmvmamba.registry import STRATEGIES


@STRATEGIES.register_module()
class FSDPStrategy(MMEngineFSDPStrategy):
    """MMEngine's strategy of the same name and arguments, whose checkpoints can be resumed.

    The difference: MMEngine 0.10.12 hands the arguments of ``optim_state_dict_to_load`` over in the order that they had
    before PyTorch 2.1, so that each resume ends with a ``TypeError``.
    """

    def load_optim_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Give each process its share of a stored optimizer state."""
        own = FullyShardedDataParallel.optim_state_dict_to_load(
            model=self.model, optim=self.optim_wrapper.optimizer, optim_state_dict=state_dict
        )
        self.optim_wrapper.load_state_dict(own)
