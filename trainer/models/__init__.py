"""Networks, one file for each family.

`model: NAME` is the file NAME.py, which defines `NAME(input_shape, num_classes, *, settings) -> nn.Module`; keyword-only
arguments are recipe keys. `timm/NAME` and `python:module:function` go to timm.py and python.py. A network that names its
blocks is a `networks.blocks.Blocks`. To add one: write the file; the contract tests find it.
"""
