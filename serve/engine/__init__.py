"""A vLLM plugin that holds all members of a population in one engine and mixes them at every token.

Pure parts, tested without vLLM: `mixture` (what answers a request), `mixing` (the pools), `rows` (which rows each member runs).
Parts that touch vLLM's internals: `plugin` (the front door; names the versions that are known), `config`, `model`, `loader`,
`attention`, `kv`, `scheduler`, `worker`, `requests`.
"""
