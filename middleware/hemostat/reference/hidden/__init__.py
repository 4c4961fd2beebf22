"""A reference on a vLLM pooling server: its final hidden states come from the server, and are multiplied by the output
embedding here. So its scores are over the full vocabulary, as with a model in process.

pooling      what a vLLM server offers (hidden states or lists of top ids), and the hidden states
folders      where the checkpoint of the server's model is
final_map    what follows the last hidden state, from config.json: logit scale, soft cap
head         the output embedding of a checkpoint with all that follows it: logits of hidden states
numpy_scores the scores of logits, where torch is not installed
products     the worker's part: products and scores
probe        whether the output head belongs to the server's model
reference    `HiddenStatesReference`
"""
