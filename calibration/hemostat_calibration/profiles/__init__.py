"""Calibration profiles: their format, families, and how they change logits.

adapter     the family adapter: a low-rank correction of weights, by layer
contextual  the contextual family
families    the table of calibration families
peft        an adapter's profile as the files of PEFT, which `peft` and vLLM load as LoRA
profile     a calibration profile
transform   the change that a profile makes to logits, in numpy

The package imports the modules of families, which register themselves in the table: whoever reads a profile knows all.
"""

from hemostat_calibration.profiles import adapter, contextual

__all__ = ["adapter", "contextual"]
