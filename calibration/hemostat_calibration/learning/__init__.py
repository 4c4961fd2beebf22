"""The learning of profiles from token records: `contextual` learns maps from hidden states to logit shifts."""
