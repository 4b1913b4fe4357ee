"""Endings of video files."""

VIDEO_ENDINGS = ("mp4", "m4v", "mkv", "webm", "avi", "mov")
"""Endings of the files that stored samples hold videos in."""
