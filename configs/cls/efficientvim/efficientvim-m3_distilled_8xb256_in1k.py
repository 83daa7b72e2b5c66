"""EfficientViM-M3 with a second set of heads, for the weights that upstream distilled from RegNetY-160.

They are tested with it. There is no teacher here: a training gives the labels to both sets of heads, which fine-tunes
these weights but is not upstream's recipe (hard labels of the teacher for the second set, half of the loss).
"""

_base_ = "./efficientvim-m3_8xb256_in1k.py"

model = dict(head=dict(distillation=True))
