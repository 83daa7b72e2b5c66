"""HRVMamba-N, 300 epochs on ImageNet-1k at 256x256, 8 GPUs x 256 images.

The blocks are those of upstream's file that builds this size. Its newest weights, in Google Drive, may be of the plain
form, ``arch="nano-plain"``, as upstream's pose models are; only the names in the file can tell:
https://drive.google.com/file/d/1vjoEmX8NGh3D4aIB2zTP6eKN23zXmd7i/view
"""

_base_ = "./hrvmamba-small_8xb128_in1k.py"

model = dict(backbone=dict(arch="nano-se-lpu"))

# 5e-4 for every 512 images.
optim_wrapper = dict(optimizer=dict(lr=2e-3))
auto_scale_lr = dict(base_batch_size=2048)

train_dataloader = dict(batch_size=256)
