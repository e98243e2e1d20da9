"""`chorus bench`: load on a gateway and what became of it."""
