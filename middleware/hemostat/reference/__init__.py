"""Reference models behind one protocol. It imports nothing: workers, which need no configuration, start sooner.

device            the device of a reference where `reference.device` is auto
exact             scores of given tokens by a causal language model of transformers, at full vocabulary
full_scores       scores over the full vocabulary, and what they are asked for
hidden            a reference on a vLLM pooling server
identity          the marks that tell one served model from another behind the same address
listing           reads a server's list of models into its base models
match             finds out if the two models use the same token ids, if they are one model, if the weights behind a
                  served name are still the same, and if all engines serve the same models
monitor           starts the references, compares each served base model with its own
on_server         a reference on a vLLM server, by whatever it offers
own_answers       the answers of a server's model, with its own list of likely ids at each token
pair              the models that are compared, as far as they are known
probes            probes of a vLLM server
protocol          the requests to a reference model, its answers, and how it fails
recovered         computes how far the reference is from the compressed model's recovered distribution
references        the references that the configuration names, by the served base model that they belong to
scoring           the parts that the two kinds of workers share
server            client of a vLLM server: scores on it, and asks what it supports
thinking_markers  the ids by which a reasoning model's thinking is recognized
transformers      the reference model on this machine, through transformers, in a worker process of its own
vllm              a reference model on another vLLM server, which scores by `prompt_logprobs`
worker            the reference worker, a process of its own
worker_client     the control process's end of a reference worker
worker_messages   messages between the control process and the reference worker
"""
