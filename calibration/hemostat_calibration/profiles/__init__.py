"""Calibration profiles: their format, families, and how they change logits.

adapter     profiles of the family adapter: a low-rank correction of weights, by layer
contextual  builds profiles of the contextual family
families    the table of calibration families
peft        an adapter's profile as the files of PEFT, which `peft` and vLLM load as LoRA
profile     a calibration profile
transform   the change that a profile makes to logits, in numpy
"""
