"""Building from, reading and writing what the original repositories define.

These modules are the only place where upstream's constructor strings are understood. A family is a module with the
three functions of ``base.Converter``; a form is one of upstream's modules of that family (its classifier, its
feature extractor).
"""

from mmvmamba.converters.base import (
    CONVERTERS,
    Converter,
    convert_state_dict,
    from_upstream,
    to_upstream_state_dict,
)

__all__ = ["CONVERTERS", "Converter", "convert_state_dict", "from_upstream", "to_upstream_state_dict"]
