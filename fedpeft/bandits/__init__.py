"""Bandits: what the server asks of each client next, learned from what came of it before."""
