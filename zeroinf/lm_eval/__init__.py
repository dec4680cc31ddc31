"""The model that lm-evaluation-harness knows as `zeroinf` once this is imported. Needs the extra `eval`."""

from zeroinf.lm_eval.model import ZeroinfLM

__all__ = ["ZeroinfLM"]
