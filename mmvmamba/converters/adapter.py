"""What converters of backbones inside a ViT-adapter share: its constructor arguments and names.

Upstream's adapters are subclasses of their backbone, whose entries have no prefix; ours is a wrapper, whose trunk is
``backbone``. Everything else has upstream's names, but for the norms of the four maps: ``ad_norm1`` in PlainMamba,
``norm1`` in ShuffleMamba and here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from mmvmamba.converters.base import Rule, StateDict, known_to, rename
from mmvmamba.converters.hierarchical import AFFINE

#: Begins the names of the trunk in our adapter.
TRUNK = "backbone."
#: A name that every adapter has and nothing else.
MARK = r"spm\.fc1\.weight"

_EXTRACTOR = r"(?:extractor|extra_extractors\.\d+)\."
_ATTENTION = r"attn\.(?:sampling_offsets|attention_weights|value_proj|output_proj)\."
_FIELD = r"(?:weight|bias)"
#: Names that are the same in upstream and here.
_SAME = (
    r"level_embed",
    rf"spm\.(?:stem\.[0-8]|conv[234]\.[01])\.{AFFINE}",
    rf"spm\.fc[1-4]\.{_FIELD}",
    r"interactions\.\d+\.injector\.gamma",
    rf"interactions\.\d+\.(?:injector\.|{_EXTRACTOR})(?:(?:query|feat)_norm\.|{_ATTENTION}){_FIELD}",
    rf"interactions\.\d+\.{_EXTRACTOR}(?:ffn_norm|ffn\.(?:fc1|fc2|dwconv\.dwconv))\.{_FIELD}",
    rf"up\.{_FIELD}",
)
_RULES = (
    *(Rule(rf"({pattern})", r"\1") for pattern in _SAME),
    Rule(rf"(?:ad_)?(norm[1-4]\.{AFFINE})", r"\1"),
)


def upstream_adapter(
    conv_inplane: int = 64,
    n_points: int = 4,
    deform_num_heads: int = 6,
    init_values: float = 0.0,
    interaction_indexes: Sequence[Sequence[int]] | None = None,
    with_cffn: bool = True,
    cffn_ratio: float = 0.25,
    deform_ratio: float = 1.0,
    add_vit_feature: bool = True,
    use_extra_extractor: bool = True,
    pretrain_size: int = 224,  # noqa: ARG001 (nothing depends on it)
) -> dict[str, Any]:
    """Translate what upstream's adapters take besides the arguments of their trunk to options of ``ViTAdapter``."""
    return dict(
        interaction_indexes=interaction_indexes,
        spatial_channels=conv_inplane,
        num_heads=deform_num_heads,
        num_points=n_points,
        value_ratio=deform_ratio,
        ffn_ratio=cffn_ratio,
        with_ffn=with_cffn,
        extra_extractors=2 if use_extra_extractor else 0,
        injector_scale=init_values,
        **({} if add_vit_feature else {"trunk_features": "none"}),
    )


def is_adapters(name: str) -> bool:
    """Return whether a name belongs to an adapter and not to its trunk."""
    return known_to(_RULES, name)


def has_adapter(names: Sequence[str] | Mapping[str, Any]) -> bool:
    """Return whether some of these names are those of an adapter."""
    return any(re.fullmatch(MARK, name) for name in names)


def read_adapter(state_dict: Mapping[str, Tensor], read_trunk: Callable[[StateDict], StateDict]) -> StateDict:
    """Return upstream's entries of an adapter, or ours, under the names of ``ViTAdapter``.

    Args:
        state_dict: Names to tensors.
        read_trunk: Renames the entries of the trunk, without a prefix.
    """
    own = {name: value for name, value in state_dict.items() if is_adapters(name)}
    trunk = {name.removeprefix(TRUNK): value for name, value in state_dict.items() if name not in own}
    return {
        **{TRUNK + name: value for name, value in read_trunk(trunk).items()},
        **rename(own, _RULES, "a ViT-adapter"),
    }


def write_adapter(
    state_dict: Mapping[str, Tensor], write_trunk: Callable[[StateDict], StateDict], norms: str
) -> StateDict:
    """Return the entries of our ``ViTAdapter`` under upstream's names, in its order; the inverse of ``read_adapter``.

    Args:
        state_dict: Names to tensors.
        write_trunk: Renames the entries of the trunk, without a prefix.
        norms: What the names of the norms of the four maps begin with, before the number.
    """
    trunk = {name[len(TRUNK) :]: value for name, value in state_dict.items() if name.startswith(TRUNK)}
    own = {name: value for name, value in state_dict.items() if not name.startswith(TRUNK)}
    rules = (*_RULES[:-1], Rule(rf"norm([1-4]\.{AFFINE})", rf"{norms}\1"))
    renamed = {**write_trunk(trunk), **rename(own, rules, "our ViT-adapter")}
    # A module's own parameters come before those of its children, the adapter's behind the trunk's.
    return dict(sorted(renamed.items(), key=lambda item: ("." in item[0], item[0] == "level_embed")))
