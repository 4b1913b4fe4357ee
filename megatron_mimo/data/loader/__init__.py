"""Conversion of streams of samples to the data of a step."""
