"""Adapters: low-rank corrections of the weights' error, in the metric of the layers' inputs and of the loss."""
