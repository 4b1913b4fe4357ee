"""Planted faults: small edits after which training goes on and is wrong, and a tool to run them.

`python -m tests.faults` answers whether a list of tests finds each of them; `tests.faults.table`
has the faults.
"""
