"""The path from a capture to a scored token record and its users, in the control process.

    passive_captures        captures of requests that the plugin in vLLM has sampled itself
    pipeline                from a capture to all users of the scored record
    limits                  back-pressure: queue, token budget, circuit breaker
    intake                  the captures that wait for the engine's answers, in the queue, or for the engine's tap
    awaited_evidence        the captures that tests of candidates wait for, which are scored before others
    answer_losses           how many of the engine's answers get lost, and what is then asked instead
    scorer                  has captures scored by the stages, and counts how they end
    stages                  the stages of a capture on its way to a `TokenRecord`
    routing                 decides which reference scores a capture
    capture_arrays          a capture's bytes as arrays
    engine_scores           log-probabilities of answers that named only the ids of their tokens
    conditioning            candidates under the grammar that restricted an output
    prompt_templates        clusters of alike prompts, over restarts
    reference_call          what the reference is asked about a capture
    record_builder          capture, tap and scores as one validated record
    record_reader           what a record may be used for, and its figures: the `ScoredRecord`
    record_users            hands scored records to their consumers, in their order
    consumers               who uses scored records
    distances               exact distances of adapters under test, which held-out records wait for
    endings                 how sampled requests and captures end, and why
    noise_floor             each model against itself
    records_file            `records.path`
    spool                   `spool.path`: captures on disk, to be scored later
    offline                 `hemostat score` and `hemostat report`: captures that are scored later than they were served
    score_rows              captured rows in, scored rows out (Arrow)

CONTRIBUTING.md follows one request from the relay to the metrics.
"""
