"""How the weights of quantized checkpoints are stored, and what they are: a module for each family of formats.

A family reads one layer at a time: the tensors of one weight become the weight, in float32. `reading.py` holds the
table of families by `quant_method`.

    awq                 AWQ's format for GEMM, as AutoAWQ, GPTQModel and AutoRound write it
    compressed_tensors  compressed-tensors: llm-compressor's formats, and what `hemostat compress` writes
    fp4                 E2M1 numbers, two in a byte, in groups: NVFP4 and MXFP4
    fp8                 E4M3 weights with one scale, a scale for each output
    gptq                GPTQ's own format, as AutoGPTQ, GPTQModel and AutoRound write it
    integers            small integers packed into 32-bit words
    modelopt            NVIDIA ModelOpt's unified checkpoints
    reading             the table of formats, and what a checkpoint's configuration says about its own
    stored_layer        the tensors of one quantized weight, checked one by one before they are used
"""
