"""A vLLM plugin that holds all members of a population in one engine and mixes them at every token.

Independent of vLLM and tested without it: `mixture` (members and weights of a request), `mixing` (the pools), `rows` (which rows
each member runs). Touching vLLM's internals: `plugin` (the entry point; refuses unknown vLLM versions), `config`, `model`,
`loader`, `attention`, `kv`, `scheduler`, `worker`, `requests`.
"""
