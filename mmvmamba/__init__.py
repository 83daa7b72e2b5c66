"""mmvmamba: vision state-space backbones for MMDetection, MMSegmentation and MMPretrain.

Importing the package needs PyTorch alone. ``mmvmamba.ops`` holds the operators, ``mmvmamba.models`` (which
needs mmengine) the backbones; OpenMMLab configs reach the latter by ``type='mmvmamba.VMamba'``.
"""

from mmvmamba.version import __version__

__all__ = ["__version__"]
