"""From a sampled request to a token record: interception, limits, scoring."""
