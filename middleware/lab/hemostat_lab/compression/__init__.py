"""Compressed copies of checkpoints.

calibrated          quantization that looks at what the layers read on texts, also by a plan (`plan.json`)
checkpoint_writer   compressed copies of a checkpoint: folders that vLLM and transformers load
equivalent          equivalent scales: numbers that are moved from what a layer reads into its weights
error_compensation  rounding that compensates its own error
fisher_information  the Fisher information of linear layers, by weight and by token
formats             how a compressed layer is stored
frame               compression of a checkpoint, one decoder layer at a time
input_moments       second moments of what linear layers read, and what is derived from them
methods             methods without data: rounding to nearest, and magnitude pruning of each layer
plan                `plan.json`: bits, group size and sparsity of each linear layer, for one source checkpoint
pruning             pruning of linear layers
repair              repair of a compressed checkpoint without overhead
rounding            rounding to nearest and magnitude pruning of one weight, without any data
tensor_files        safetensors files written tensor by tensor, for checkpoints that are larger than the memory
unpacking           packed checkpoints, and dense copies of them for engines without kernels for packed weights
"""
