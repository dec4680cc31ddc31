"""Registers the model `zeroinf` with lm-evaluation-harness when imported. Needs the extra `eval`."""

from zeroinf.lm_eval.model import ZeroinfLM

__all__ = ["ZeroinfLM"]
