"""TEMP"""
import math
import torch
def clip(rows, bound):
    rows = rows.double()
    bad = ~torch.isfinite(rows).all(1)
    rows = rows.masked_fill(bad[:, None], 0.0)
    norms = torch.linalg.vector_norm(rows, dim=1)
    return rows * (bound / norms.clamp(min=bound))[:, None], norms <= bound
def adapt(bound, share, target, rate):
    return bound * math.exp(-rate * (share - target))
def split(z, s):
    return (z**-2 - (2*s)**-2) ** -0.5
