"""Endings of audio files."""

AUDIO_ENDINGS = ("wav", "flac", "mp3", "ogg", "oga", "opus", "m4a", "aac")
"""Endings of the files that stored samples hold clips in."""
