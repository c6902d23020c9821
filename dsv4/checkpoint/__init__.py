"""Checkpoints in the official layout: the names they must hold, reading without trust, loading, writing."""
