"""What `bench_recovery.py` is made of: prompts, text and features from the engine, families, outcomes."""
