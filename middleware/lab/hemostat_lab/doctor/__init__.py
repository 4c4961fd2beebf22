"""`hemostat doctor`: the offline report on a compressed model and its reference.

causes        why the compressed model differs
checkpoints   two transformers checkpoints in this process, at full vocabulary
classes       the class of a token, from its text
estimates     means over tokens with standard errors by request and by token
html          the report as one HTML page (Jinja2, extra `report`)
kl_meter      KL(r‖c) of altered models on the same tokens
main          `hemostat doctor`: load two models, score prompt by prompt, compare the layers
options       the options of `hemostat doctor` and their checks
pair          the interface to a pair of models, in process or on servers, and the scored tokens
prescription  the prescription: bits, group size and sparsity of each layer within a budget of bytes
prompts       the prompt file: one prompt per line, as JSON or as plain text
report        the tables of the report from the scored tokens, as JSON values
servers       two vLLM servers as a pair of models
sweep         `hemostat doctor --sweep`
terminal      the report as terminal tables
"""

from __future__ import annotations

from hemostat_lab.doctor.main import run
from hemostat_lab.doctor.options import DoctorOptions

__all__ = ["DoctorOptions", "run"]
