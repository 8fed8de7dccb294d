"""Structured pruning: whole attention heads and channels of feed-forward layers, by client."""
