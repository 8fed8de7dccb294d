"""Differential privacy without models: mechanisms as data, their accounting, the ledger."""
