"""The HTTP API: routes, schemas, errors, the OpenAPI document."""
