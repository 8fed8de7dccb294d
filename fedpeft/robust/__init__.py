"""Aggregation that bears some hostile updates: settings, distances between updates, the rules.

``settings`` says which rule and for how many attackers, and loads no torch. ``rules.combine``
applies it to the updates of a round.
"""
