"""What `--align` can align a SiT's tokens with. Everything else in training is the same for all methods: data, order,
seeds and draws."""

from __future__ import annotations

from alignment import dispersive, ig, layersync, repa, sra, vae
from alignment.terms import AlignmentMethod

METHODS: dict[str, AlignmentMethod] = {"vae": vae.METHOD, "repa": repa.METHOD, "sra": sra.METHOD}
METHODS |= {"layersync": layersync.METHOD, "ig": ig.METHOD, "dispersive": dispersive.METHOD}


def parse_align(align: str) -> list[str]:
    """Names of the methods that a value of `--align` joins by "+", in the order of `METHODS`.

    Raises:
        ValueError: one is unknown, or named twice.
    """
    if align == "none":
        return []
    names = align.split("+")
    if len(set(names)) != len(names) or not set(names) <= set(METHODS):
        raise ValueError(f"--align: expected none or some of {', '.join(METHODS)}, as in repa+vae, found {align!r}")
    return [name for name in METHODS if name in names]


def needs_of(align: str) -> set[str]:
    """What the methods of a value of `--align` need of a batch: "images", "t_offset"."""
    return set().union(*(METHODS[name].needs for name in parse_align(align)))
