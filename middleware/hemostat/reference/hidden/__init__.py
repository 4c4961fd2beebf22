"""A reference on a vLLM pooling server: its final hidden states come from the server, and are multiplied by the output
embedding here. So its scores are over the full vocabulary, as with a model in process.

pooling   what a vLLM server offers (hidden states or lists of top ids), and the hidden states
folders   where the checkpoint of the server's model is
head      the output embedding of a checkpoint with all that follows it (logit scale, soft cap): logits of hidden
          states
products  the worker's part: products and scores, with numpy where torch is not installed
probe     whether the output head belongs to the server's model
reference `HiddenStatesReference`
"""
