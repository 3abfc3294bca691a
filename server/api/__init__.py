"""What stands on the wire: routes, schemas, errors, the OpenAPI document."""
