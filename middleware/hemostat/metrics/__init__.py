"""The names and help texts of all metrics, and the Prometheus collector.

catalogue  every metric on /metrics
collector  the Prometheus collector: asks every subsystem for its samples at each scrape
engines    the metrics of the engines
names      the name of every metric, once
reasons    outcomes of sampled requests, and the reasons for them
samples    the description of a metric, and the values that a subsystem gives the collector
"""
