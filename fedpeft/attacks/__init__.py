"""Malicious clients, for tests and studies of robust aggregation: never for a real federation.

``settings`` says what they do and how many they are, and loads no torch. ``tampering`` draws who
they are and changes the updates that leave them; ``fedpeft.data.poison`` changes the examples that
they train on.
"""
