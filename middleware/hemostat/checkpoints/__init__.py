"""The parts of checkpoints that serving needs: digest, architecture, output embedding, texts, and reading in pieces.

Whatever opens a whole checkpoint is in the laboratory, `hemostat_lab`.
"""
