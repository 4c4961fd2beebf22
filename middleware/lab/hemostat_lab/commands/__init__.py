"""The commands of the laboratory. `hemostat` finds them by their entry points.

adapt           `hemostat adapt`: an adapter that compensates the weights' error of a compressed checkpoint
adapt_steps     the steps of `hemostat adapt`
arguments       arguments that several commands of the laboratory share
compress        `hemostat compress`: quantize or prune a checkpoint
compress_steps  the steps of `hemostat compress`
demo            `hemostat demo`: real models and real prompts on this machine
doctor          `hemostat doctor`: an offline report on two models
texts           texts for commands that calibrate
"""
