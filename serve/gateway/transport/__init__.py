"""Client connections and request bodies, with bounds on what a client can send or hold."""
