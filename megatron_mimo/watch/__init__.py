"""Observation of a run: metrics, traces, reports and saved activations."""
