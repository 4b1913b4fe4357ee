"""Conversations, prompts and tokens."""
