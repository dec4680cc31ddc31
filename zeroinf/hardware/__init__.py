"""What the machine has: GPUs, memory under its limits, disks, and what DeepSpeed needs of them.

Snapshots are frozen dataclasses, so that everything above can be tried on machines that are not here.
"""
