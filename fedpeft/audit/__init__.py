"""Empirical privacy: attacks on a run, and what they prove about its epsilon.

An accountant says from above what a mechanism may leak; an audit says from below what it did leak.
A lower bound above the claimed epsilon is a defect of the code that ran, with the confidence that
the bound has. A lower bound below it proves nothing.

bounds: from an attack's hits to a lower bound on epsilon. evidence: all of it for scored canaries.
canaries: examples and update directions whose presence a fair coin decided. membership: attacks
that tell members by their loss. inversion: an attack that reads the text out of an update.
mechanism: the attack on one mechanism, in isolation. run: the attacks on a whole run.
"""
