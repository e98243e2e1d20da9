"""FastAPI in front of engines: an OpenAI API with a budget per request.

A request passes through the packages from the top down: `api` reads it, `relay` sends it on and returns the answer, `admission`
decides when, where and with how many members it runs, and `engines` tracks each engine. `observe` records requests. `request` holds
the checked request, `shared` the state that gateways share, `transport` the connections. Imports point downwards only
(pyproject.toml).
"""
