"""The path from a capture to a scored token record and its users, in the control process.

    pipeline                from a capture to all users of the scored record
    limits                  back-pressure: queue, token budget, circuit breaker
    tapped_answers          captures whose tokens the engine's plugin hands out
    answer_losses           how many of those get lost, and what is then asked instead
    scorer                  scores captures on the reference
    prompt_templates        clusters of alike prompts, over restarts
    conditioning            candidates under the grammar that restricted an output
    record_builder          capture, tap and scores as one validated record
    record_reader           what a record may be used for, and its figures: the `ScoredRecord`
    record_users            hands scored records to their consumers, in their order
    consumers               who uses scored records
    distances               exact distances of adapters under test, which held-out records wait for
    endings                 how sampled requests and captures end, and why
    seen_units              conversations that a kind has seen already
    noise_floor             each model against itself
    records_file            `records.path`

CONTRIBUTING.md follows one request from the relay to the metrics.

Further modules:

    capture_arrays  a capture's bytes as arrays
    engine_scores   log-probabilities of answers that named only the ids of their tokens
    intake          the captures that wait for the engine's answers, in the queue, or for the engine's tap
    reference_call  asks the reference about a capture: a stage of `hemostat.scoring.stages`
    routing         decides which reference scores a capture
    stages          the stages of a capture on its way to a `TokenRecord`
"""
