"""TEMP"""
import math
import numpy as np
def coefficients(bands):
    c=[1.0]
    for k in range(1,bands): c.append(c[-1]*(2*k-1)/(2*k))
    return c
def correlated(z, previous, coef):
    out = z.clone()
    for j in range(1, len(coef)):
        if j <= len(previous): out -= coef[j]*previous[-j]
    return out
def sensitivity(bands, rounds, separation, k):
    return math.sqrt(k*sum(c*c for c in coefficients(bands)))
