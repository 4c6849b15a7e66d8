"""The HTTP layer of the server: application, connections, tokens, OpenAPI description."""
