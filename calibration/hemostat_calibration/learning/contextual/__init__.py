"""Learning contextual profiles: a map from hidden states to logit shifts."""
