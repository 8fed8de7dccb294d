"""Devices: peak arithmetic, memory, power, and the modes that they run in.

Peaks of the Jetsons are ``cores * 2 * 2 * clock``: fused multiply-adds, two fp16 numbers per core,
no tensor cores. The vendor's data sheets agree for the TX2 (1.33 TFLOPS at 1.30 GHz) and the Xavier
NX (1.69 at 1.1). What nobody has checked against a source is named in ``assumed``: it makes a
plausible fleet and is no measurement of one.
"""

from __future__ import annotations

from dataclasses import dataclass

GIGA = 1e9


@dataclass(frozen=True)
class Profile:
    """A kind of device.

    modes: peak in FLOP/s in each of its power modes. memory: bytes. bandwidth: of memory, bytes/s.
    power: watts while it computes, by mode; empty where it is not known. assumed: which of these
    fields are assumptions.
    """

    modes: tuple[float, ...]
    memory: float
    bandwidth: float
    power: tuple[float, ...] = ()
    assumed: tuple[str, ...] = ()


def peaks(cores: int, *clocks: float) -> tuple[float, ...]:
    """fp16 FLOP/s of a GPU at clocks in GHz."""
    return tuple(cores * 4 * clock * GIGA for clock in clocks)


PROFILES = {
    "jetson_tx2": Profile(
        peaks(256, 1.30, 0.85, 1.12, 1.12, 1.12)[:4],
        8e9,
        59.7e9,
        (15.0, 7.5, 15.0, 15.0),
        ("power",),
    ),
    "jetson_xavier_nx": Profile(
        peaks(384, 1.1, 0.8), 8e9, 51.2e9, (15.0, 10.0), ("modes", "bandwidth", "power")
    ),
    "jetson_agx_xavier": Profile(
        peaks(512, 1.377, 0.9, 0.67, 0.52),
        32e9,
        137e9,
        (50.0, 30.0, 15.0, 10.0),
        ("modes", "power"),
    ),
    "jetson_nano": Profile(peaks(128, 0.92), 4e9, 25.6e9, (10.0,), ("power",)),
    "jetson_orin_nano": Profile(
        (2.6e12,), 8e9, 68e9, (15.0,), ("modes", "memory", "bandwidth", "power")
    ),
    "rpi4": Profile((1e10,), 4e9, 4e9, (6.0,), ("modes", "memory", "bandwidth", "power")),
    "server_gpu": Profile((1e14,), 80e9, 2e12, (400.0,), ("modes", "bandwidth", "power")),
}

JETSON80 = {"jetson_tx2": 30, "jetson_xavier_nx": 40, "jetson_agx_xavier": 10}
"""30 TX2, 40 NX and 10 AGX, as reported of FedSpine's testbed; its modes are assumptions here."""

TRANSMIT = 1.0
"""Watts while a device sends or receives; an assumption."""
