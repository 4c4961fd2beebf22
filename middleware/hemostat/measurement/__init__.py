"""Streaming figures of the scored requests, in groups; the alarms on them.

alarms            the hemorrhage alarm while serving
by_decoding       the figures by the request's own decoding
by_engine         the figures of each engine, and which of several is an outlier
by_kind           the figures of each kind of traffic
by_model          figures of the served models that are compared with their reference
by_place          the figures by position in the output, by length of the context, and by phase
conditional       figures of requests whose tokens a grammar restricts
coverage          coverage: which part of what sampled requests generated is scored, by kind
dependence        the dependence of the requests of a group on each other
figures           the figures of one group of scored requests, with their intervals
gains             the gains of a profile, by token and by request, with both intervals; JSON-ready
measured          all that is measured
measurements      everything measured so far
outcome_sampling  decides which conversations' outcomes relays report
outcomes          outcomes of answers by kind of traffic and arm
rates             the smoothed number of events per second
survival          the length for which the texts of both models stay equal, estimated from the scored requests
thinking          the length of a reasoning model's thinking, and how often it does not end, by arm
"""
