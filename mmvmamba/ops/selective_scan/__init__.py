"""The selective scan operator."""

from mmvmamba.ops.selective_scan.interface import selective_scan

__all__ = ["selective_scan"]
