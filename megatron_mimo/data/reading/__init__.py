"""Streams of samples from datasets, read in this process or in others."""
