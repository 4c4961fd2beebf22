"""The name of every metric, once: a constant is the name without `hemostat_` and `_total`, in upper case.

A leaf: it imports nothing. No other module of the product has a metric's name as a string (tests/metrics checks it).
What each metric is, is declared in `catalogue`.
"""

from __future__ import annotations

# The proxy
REQUESTS = "hemostat_requests_total"
REPEATED_REQUESTS = "hemostat_repeated_requests_total"
PROXY_OVERHEAD_SECONDS = "hemostat_proxy_overhead_seconds"
RELAYS = "hemostat_relays"
MODEL_INFO = "hemostat_model_info"
CONFIG_LAST_RELOAD_SUCCESSFUL = "hemostat_config_last_reload_successful"
CLIENT_LIMITED_REQUESTS = "hemostat_client_limited_requests_total"
ACCESS_LOG_DROPPED_LINES = "hemostat_access_log_dropped_lines_total"

# The shadow
SHADOW_REQUESTS = "hemostat_shadow_requests_total"
SHADOW_RATE_RATIO = "hemostat_shadow_rate_ratio"
SHADOW_QUEUE_DEPTH = "hemostat_shadow_queue_depth"
SHADOW_LAG_SECONDS = "hemostat_shadow_lag_seconds"
REFERENCE_UP = "hemostat_reference_up"
REFERENCE_TOKENS = "hemostat_reference_tokens_total"
SCORED_TOKENS = "hemostat_scored_tokens_total"

# Coverage
SAMPLED_REQUESTS = "hemostat_sampled_requests_total"
SAMPLED_TOKENS = "hemostat_sampled_tokens_total"
KIND_SAMPLED_TOKENS = "hemostat_kind_sampled_tokens_total"

# Divergence
DIVERGENCE = "hemostat_divergence"
EFFECTIVE_REQUESTS = "hemostat_effective_requests"
VARIANCE_INFLATION_RATIO = "hemostat_variance_inflation_ratio"
TOKEN_KL_NATS = "hemostat_token_kl_nats"  # noqa: S105  no secret
TOKEN_TOTAL_VARIATION = "hemostat_token_total_variation"  # noqa: S105  no secret
KL_NATS = "hemostat_kl_nats_total"
KL_TOKENS = "hemostat_kl_tokens_total"
KIND_KL_NATS = "hemostat_kind_kl_nats_total"
KIND_KL_TOKENS = "hemostat_kind_kl_tokens_total"
KIND_GAIN_NATS = "hemostat_kind_gain_nats"
KIND_DRAFT_ACCEPTANCE_RATIO = "hemostat_kind_draft_acceptance_ratio"
PLACE_KL_NATS = "hemostat_place_kl_nats_total"
PLACE_KL_TOKENS = "hemostat_place_kl_tokens_total"
THINKING_REQUESTS = "hemostat_thinking_requests_total"
THINKING_TOKENS = "hemostat_thinking_tokens_total"
CONDITIONAL_DIVERGENCE = "hemostat_conditional_divergence"
CONDITIONAL_KIND_KL_NATS = "hemostat_conditional_kind_kl_nats_total"
CONDITIONAL_KIND_KL_TOKENS = "hemostat_conditional_kind_kl_tokens_total"
CONDITIONAL_KIND_GAIN_NATS = "hemostat_conditional_kind_gain_nats"
TOP1_AGREEMENT_TOKENS = "hemostat_top1_agreement_tokens_total"
TOP1_KNOWN_TOKENS = "hemostat_top1_known_tokens_total"
COVERED_MASS_RATIO = "hemostat_covered_mass_ratio"
RECOVERED_DISTRIBUTION_RATIO = "hemostat_recovered_distribution_ratio"
SURVIVAL_HALF_LIFE_TOKENS = "hemostat_survival_half_life_tokens"
NOISE_FLOOR_NATS = "hemostat_noise_floor_nats"
NOISE_FLOOR_REQUESTS = "hemostat_noise_floor_requests_total"

# The alarm
HEMORRHAGE_ALARM = "hemostat_hemorrhage_alarm"
HEMORRHAGE_EVIDENCE_RATIO = "hemostat_hemorrhage_evidence_ratio"
ALARM_BASELINE_RATIO = "hemostat_alarm_baseline_ratio"
ALARM_SPREAD_RATIO = "hemostat_alarm_spread_ratio"
WORKLOAD_CHANGED = "hemostat_workload_changed"
WORKLOAD_DISTANCE_RATIO = "hemostat_workload_distance_ratio"

# Calibration
CALIBRATION_REQUESTS = "hemostat_calibration_requests_total"
RECOVERED_DIVERGENCE_RATIO = "hemostat_recovered_divergence_ratio"
PROFILE_KIND_INFO = "hemostat_profile_kind_info"
PROFILE_KIND_GAIN_NATS = "hemostat_profile_kind_gain_nats"
PROFILE_KIND_TOTAL_VARIATION_GAIN = "hemostat_profile_kind_total_variation_gain"
PROFILE_KIND_EVIDENCE_RATIO = "hemostat_profile_kind_evidence_ratio"
PROFILE_DECISIONS = "hemostat_profile_decisions_total"
LEARNED_TOKENS = "hemostat_learned_tokens_total"
FEATURES_DROPPED = "hemostat_features_dropped_total"

# Adapters
ADAPTER_BUILDS = "hemostat_adapter_builds_total"
ADAPTER_RANK = "hemostat_adapter_rank"
ADAPTER_BYTES = "hemostat_adapter_bytes"
ADAPTER_HELD_OUT_RECOVERED_RATIO = "hemostat_adapter_held_out_recovered_ratio"
ADAPTER_JUDGED = "hemostat_adapter_judged_total"

# The engines that requests go to
UPSTREAM_UP_RATIO = "hemostat_upstream_up_ratio"
UPSTREAM_DRAINED = "hemostat_upstream_drained"
UPSTREAM_OUTSTANDING = "hemostat_upstream_outstanding"
ENGINE_KL_NATS = "hemostat_engine_kl_nats_total"
ENGINE_KL_TOKENS = "hemostat_engine_kl_tokens_total"
ENGINE_OUTLIER = "hemostat_engine_outlier"
ENGINE_OUTLIER_EVIDENCE_RATIO = "hemostat_engine_outlier_evidence_ratio"

# Canaries
CANARY_CHANGED = "hemostat_canary_changed"
CANARY_DISTANCE_NATS = "hemostat_canary_distance_nats"
CANARY_REPLAYS = "hemostat_canary_replays_total"

# The live gate
GATE_STATE = "hemostat_gate_state"
GATE_UNITS = "hemostat_gate_units"
GATE_EXCESS_RATIO = "hemostat_gate_excess_ratio"
GATE_CANDIDATE_TOKENS = "hemostat_gate_candidate_tokens_total"
GATE_FAILURES = "hemostat_gate_failures_total"

# The engine's plugin
ENGINE_PLUGINS = "hemostat_engine_plugins"
ENGINE_EVENTS = "hemostat_engine_events_total"
ENGINE_TAPS_DROPPED = "hemostat_engine_taps_dropped_total"
ENGINE_ANSWERS = "hemostat_engine_answers_total"
ENGINE_ANSWERS_PAUSED = "hemostat_engine_answers_paused"

# Adapters at the engine
ADAPTERS = "hemostat_adapters"
ADAPTER_LOADS = "hemostat_adapter_loads_total"
ADAPTER_PROBES = "hemostat_adapter_probes_total"

# What clients got, of all generations
RESPONSES_FINISHED = "hemostat_responses_finished_total"
OUTPUT_TOKENS = "hemostat_output_tokens_total"
REPETITION_LOOPS = "hemostat_repetition_loops_total"
STRUCTURED_OUTPUTS = "hemostat_structured_outputs_total"

# Failures of Hemostat itself; all of these should stay 0
INTERNAL_ERRORS = "hemostat_internal_errors_total"
STORE_ERRORS = "hemostat_store_errors_total"
RECORDS_LOST = "hemostat_records_lost_total"
OUTCOME_DIFFERENCE = "hemostat_outcome_difference"
OUTCOME_HARM = "hemostat_outcome_harm"
CLOSED_CONNECTIONS = "hemostat_closed_connections_total"
