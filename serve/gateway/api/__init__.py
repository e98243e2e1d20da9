"""The HTTP API: routes, how requests are read, the OpenAPI document, the playground."""
