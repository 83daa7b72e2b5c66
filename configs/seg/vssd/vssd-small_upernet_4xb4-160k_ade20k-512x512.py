"""UperNet with VSSD-S, 160k iterations on ADE20K at 512x512; upstream has the config and publishes no result.

Upstream starts from the averaged weights of the ImageNet file, entry "model_ema"; this one takes "model".
"""

_base_ = "./vssd-tiny_upernet_4xb4-160k_ade20k-512x512.py"

# The official ImageNet weights (84.1 % top-1 as published).
checkpoint = "https://huggingface.co/YuhengSSS/VSSD/resolve/main/vssd_small_best_ema.pth"
model = dict(backbone=dict(arch="small", init_cfg=dict(checkpoint=checkpoint)))
