"""Files of weights: reading them safely, proving that they are whole, writing them so that none is lost.

Nothing here knows a model: ``models`` loads what is read here, ``converters`` know the names of other repositories,
``engine`` saves.
"""

from mmvmamba.checkpoints.atomic import replacing
from mmvmamba.checkpoints.manifest import Manifest, manifest_path, read_manifest, write_manifest
from mmvmamba.checkpoints.reader import read_checkpoint

__all__ = ["Manifest", "manifest_path", "read_checkpoint", "read_manifest", "replacing", "write_manifest"]
