"""Communication: what is sent, and what it costs in bytes."""
