"""FastAPI in front of engines: an OpenAI API with a budget per request.

The way of a request, from the top down: `api` reads it, `relay` sends it and passes the answer on, `admission` decides when, where
and with how many members it runs, and `engines` tracks each engine. `observe` records it. `request` holds its checked form,
`shared` the state of several gateways, `transport` the connections. Imports point downwards only (pyproject.toml).
"""
