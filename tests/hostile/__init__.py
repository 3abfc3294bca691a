"""Hostile uploads: a table of attacks on POST /v1/adapters, made on the spot, each with the refusal it must meet.

`ATTACKS` maps a name to an `Attack`; `send` runs one against a server over a socket. One module per family; `attack.py`
is what they share, `good.py` the sound adapter that each of them spoils in one place.
"""

from tests.hostile import bodies, configs, names, streams, tars, weights, zips
from tests.hostile.attack import Attack, Attacks, Setting, Upload
from tests.hostile.good import good_uploads
from tests.hostile.sending import send, send_upload

FAMILIES = {module.__name__.rpartition(".")[2]: module.ATTACKS for module in (
    bodies, streams, names, zips, tars, configs, weights
)}  # fmt: skip
ATTACKS: Attacks = {name: attack for family in FAMILIES.values() for name, attack in family.items()}
assert len(ATTACKS) == sum(len(family) for family in FAMILIES.values()), "two attacks of one name"

__all__ = ["ATTACKS", "FAMILIES", "Attack", "Setting", "Upload", "good_uploads", "send", "send_upload"]
