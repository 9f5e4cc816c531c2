"""What happens to files: kinds of damage, as functions on a file's bytes, and a file that is gone."""

from collections.abc import Callable
from functools import partial
from pathlib import Path


def flip_bit(data: bytes, at: float = 0.5) -> bytes:  # 0 to 1: where, as a share of the bits
    "The bytes with one bit the other way round."
    bit = min(int(8 * len(data) * at), 8 * len(data) - 1)
    return data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :]


DAMAGE: dict[str, Callable[[bytes], bytes | None]] = {  # name: the damaged bytes; None for a file that is gone
    "emptied": lambda data: b"",
    "halved": lambda data: data[: len(data) // 2],
    "zeroed": lambda data: bytes(len(data)),
    "zero-tailed": lambda data: data[: len(data) // 2] + bytes(len(data) - len(data) // 2),
    "bit flipped": flip_bit,
    "bit flipped near the begin": partial(flip_bit, at=0.07),
    "bit flipped near the end": partial(flip_bit, at=0.93),
    "gone": lambda data: None,
}


def damage_file(path: Path, name: str) -> bytes:  # a key of DAMAGE
    "Damage a file in place; the bytes that it had."
    data = path.read_bytes()
    damaged = DAMAGE[name](data)
    path.unlink() if damaged is None else path.write_bytes(damaged)
    return data
