"""The parts of checkpoints that serving needs: digest, architecture, output embedding, texts, and reading in pieces.

Whatever opens a whole checkpoint is in the laboratory, `hemostat_lab`.

    architectures      which architectures of transformers are supported
    checkpoint_digest  the digest of a checkpoint's files
    errors             the error of this package
    output_embedding   the output embedding of a checkpoint, read without torch: W with logits = W h
    piecewise          a causal language model of transformers that reads texts piece by piece
    texts              the texts that an adapter is made from, and those that it is judged on
"""
