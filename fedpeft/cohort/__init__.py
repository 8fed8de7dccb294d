"""The batched cohort: K clients on one frozen base (DESIGN §3).

``lanes`` runs the model for K clients at once, ``local`` (one level up) trains with it, ``clients``
gives a strategy its Cohort, ``federation`` walks a round's clients in chunks.
"""
