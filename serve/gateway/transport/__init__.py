"""Connections and bodies, with bounds on what a client can send or hold."""
