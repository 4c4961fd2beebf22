"""Hemostat's pure core: arrays in, arrays out. No IO, no clock, no randomness of its own.

adapters        adapters: low-rank corrections of the weights' error
alarm           the hemorrhage alarm
allocation      the division of a budget of bytes between the units of a model
allowed_sets    the ids that a grammar allows at each position of an output, as packed bits
arrays          names for the array types that the core passes about
backoff         pauses between attempts, which grow with the failures in a row
canaries        the test if the scores of the same token sequences have changed
canary_cause    finds the cause of a difference of canaries
canary_endpoint compares the first tokens of answers of an endpoint that is known by its API alone
canary_prefix   makes canaries behind a shared prefix that is in the engine's prefix cache
canary_route    compares canaries that were asked for through a public address
canary_short    decides from short sequences if an engine has changed, within a minute
canary_texts    compares what a server makes of texts as clients send them
canary_weights  compares checksums of an engine's weights, tensor by tensor
described_enum  enumerations of label values, each with what it means
divergence      divergences between two models on the same tokens
elapsed         elapsed time that evidence may rely on
engine_keys     the keys of `vllm_xargs` that the engine's plugin reads
errors          the one error tree of the core
gate            the verdict on a candidate: pass, fail or undecided
guard           decides from held-out evidence which profile may serve which kind of request
learning        the learning of profiles from token records
messages        the forms in which messages show addresses and other libraries' errors
outcomes        compares what people notice of answers between the arms of one profile in one kind of traffic
passive         the messages of passive mode, in which the plugin samples requests itself
plugin_version  the version of the plugin in vLLM, and the rule by which it fits a control process
profiles        calibration profiles: their format, families, and how they change logits
reasoning       where a reasoning model's thinking ends and its answer begins, found by token ids
records         token records: both models' log-probabilities of the same tokens
record_checks   the checks of a token record
state_codec     dataclasses as JSON bytes, for restarts
state_recovery  the compressed model's whole distribution, recovered from its logits at anchors
statistics      streaming estimators, and intervals and tests that are valid at every look
thresholds      robustness thresholds
"""

__version__ = "0.3.0.dev0"
