"""The names and help texts of all metrics, and the Prometheus collector."""
