"""Curves elsewhere: W&B and MLflow, each written by a process of its own beside the logging rank.

The packages of these services are imported in that process only, so nothing that they do, and no
server that they wait for, can end, stop or slow a rank.
"""
