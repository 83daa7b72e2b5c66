"""Registries of mmvmamba, children of MMEngine's root registries.

``locations`` lets MMEngine import our classes on demand, so a config of MMDetection, MMSegmentation or
MMPretrain only writes ``type='mmvmamba.VMamba'``: no ``custom_imports`` and no change of ``default_scope``.

Importing this module also makes MMEngine read every checkpoint of the process with ``read_checkpoint``, which runs
nothing that a file holds (``mmvmamba.checkpoints.mmengine_loader``).
"""

from mmengine.registry import FUNCTIONS as MMENGINE_FUNCTIONS
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import LOOPS as MMENGINE_LOOPS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.registry import OPTIM_WRAPPERS as MMENGINE_OPTIM_WRAPPERS
from mmengine.registry import STRATEGIES as MMENGINE_STRATEGIES
from mmengine.registry import Registry

from mmvmamba.checkpoints.mmengine_loader import install as _install_checkpoint_loader

# Whoever registers or builds a part of mmvmamba gets its reader of checkpoints with it, for the whole process.
_install_checkpoint_loader()

MODELS = Registry("model", parent=MMENGINE_MODELS, scope="mmvmamba", locations=["mmvmamba.models"])

HOOKS = Registry("hook", parent=MMENGINE_HOOKS, scope="mmvmamba", locations=["mmvmamba.engine"])

LOOPS = Registry("loop", parent=MMENGINE_LOOPS, scope="mmvmamba", locations=["mmvmamba.engine"])

OPTIM_WRAPPERS = Registry(
    "optim_wrapper", parent=MMENGINE_OPTIM_WRAPPERS, scope="mmvmamba", locations=["mmvmamba.engine"]
)

OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    "optimizer wrapper constructor",
    parent=MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS,
    scope="mmvmamba",
    locations=["mmvmamba.engine"],
)

FUNCTIONS = Registry("function", parent=MMENGINE_FUNCTIONS, scope="mmvmamba", locations=["mmvmamba.engine"])

STRATEGIES = Registry(
    "strategy", parent=MMENGINE_STRATEGIES, scope="mmvmamba", locations=["mmvmamba.engine.strategies"]
)

__all__ = [
    "FUNCTIONS",
    "HOOKS",
    "LOOPS",
    "MODELS",
    "OPTIM_WRAPPERS",
    "OPTIM_WRAPPER_CONSTRUCTORS",
    "STRATEGIES",
]
