"""Engines: their health, load and expected times, and the process of the gateway's own engine."""
