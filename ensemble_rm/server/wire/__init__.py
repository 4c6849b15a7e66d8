"""Wire formats: the requests and responses of each kind of client."""
