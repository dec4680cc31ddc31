"""The systems that zeroinf is compared with, behind the same protocol: a whole model on one device, accelerate's device
map, and DeepSpeed-Inference's tensor parallelism.

They run as their own users run them; nothing here makes them faster.
"""
