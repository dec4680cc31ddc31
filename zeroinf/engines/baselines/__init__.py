"""The systems that zeroinf is compared with, behind the same protocol: a whole model on one device, accelerate's device
map, and DeepSpeed-Inference's tensor parallelism.

Each runs as its own users run it; nothing here makes it faster.
"""
