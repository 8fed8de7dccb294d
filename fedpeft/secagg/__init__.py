"""Secure aggregation: the server learns the sum of the clients' vectors and no vector of its own.

Double masking after Bonawitz et al. (2017, CCS, "Practical Secure Aggregation for
Privacy-Preserving Machine Learning", figure 4), with its signed keys and its consistency check
against a malicious server. ``session.Session`` is the server's half, ``participant.Participant`` a
client's; a transport moves one blob of bytes each way per client and stage.
``docs/secure-aggregation.md`` says what is protected from whom, and what is not.
"""
