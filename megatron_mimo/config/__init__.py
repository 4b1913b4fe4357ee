"""Settings of a run: flags, files, presets, and their combined meaning."""
