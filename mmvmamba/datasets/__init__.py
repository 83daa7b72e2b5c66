"""Data sets made by mmvmamba itself."""

from mmvmamba.datasets.digits import CLASSES, SEG_CLASSES, DigitsSettings, write_digits

__all__ = ["CLASSES", "SEG_CLASSES", "DigitsSettings", "write_digits"]
