"""UPerNet with ShuffleMamba-B in a ViT-adapter, 160k iterations on ADE20K at 512x512.

The optimizer is that of the model without an adapter. Weights of a classifier start the part inside it:
``--cfg-options model.backbone.backbone.init_cfg.type=Pretrained model.backbone.backbone.init_cfg.checkpoint=FILE``.
"""

_base_ = "./shufflemamba-base_upernet_4xb4-160k_ade20k-512x512.py"

model = dict(
    backbone=dict(
        _delete_=True,
        type="mmvmamba.ViTAdapter",
        backbone=dict(
            type="mmvmamba.ShuffleMamba",
            arch="base",
            cls_token="none",  # noqa: S106 (no password)
            drop_path_rate=0.2,
        ),
        interaction_indexes=((0, 5), (6, 11), (12, 17), (18, 23)),
        num_heads=12,
        value_ratio=0.5,
        trunk_features="each",
        norm="synchronised_batch_norm",
    ),
)
