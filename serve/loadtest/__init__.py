"""`chorus bench`: a load test of a gateway."""
