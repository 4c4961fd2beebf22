"""Decides from held-out evidence which profile may serve which kind of request.

wealth      e-processes of the hypothesis that a mean gain is at most 0, by client
harm        the evidence that what serves harms, a sum that is funded anew
closing     the closed test over the kinds of one candidate
decisions   actions, reasons, evidence
kind_test   one running test: one profile in one kind
guard       `Guard`: all tests, the alpha that they spend, and the decisions
saving      the state as JSON bytes and back
"""
