"""Engines as the gateway sees them: health, load, expected times, and the process of its own engine."""
