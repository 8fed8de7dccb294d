"""A simulated fleet: how long clients' devices and links take, who is there, and a virtual clock.

No wall time anywhere. Training is computed eagerly, by whichever engine; the clock says how long it
would have taken, what a cohort contains and what of it counts. This package knows arrays, seconds
and bytes; ``fedpeft.timed`` puts it beside a run.

All draws come from the run's seed, one stream each for devices, speed, network, availability and
dropout; those of a client in a round do not depend on who else is in it.
"""
