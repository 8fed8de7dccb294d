"""Data: sources -> tokenised examples -> clients."""
