"""Per on the wire: requests, connections, and what its answers mean."""
