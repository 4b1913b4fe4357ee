"""Videos: from a file to groups of frames, cut into patches."""
