"""zeroinf: throughput inference for language models that do not fit the GPU."""

__version__ = "0.1.0"
__all__ = ["__version__"]
