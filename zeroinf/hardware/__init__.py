"""Facts about the machine: GPUs, memory under its limits, disks, and DeepSpeed's requirements.

Snapshots are frozen dataclasses, so that everything above can be tried on machines that are not here.
"""
