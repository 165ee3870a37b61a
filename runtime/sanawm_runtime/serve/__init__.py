"""`sanawm serve`: a page and a WebSocket on which people and programs steer streams."""
