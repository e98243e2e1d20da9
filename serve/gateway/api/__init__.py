"""The HTTP API: routes, request reading, the OpenAPI document and the playground."""
