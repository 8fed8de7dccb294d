"""Differential privacy: mechanisms, their accounting, the ledger, and the statement about a run."""
