"""Spoils the content of a file in one place, by its kind."""

import gzip
import io
import os
import pickle
import random
import re
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

CANARY = "ran"  # the folder that payloads make
NUMBERS = ["9" * 30, "9" * 400, "9" * 5000, *"-1 0 1 2 3 0.5 -0.5 1e400 1e38 nan".split()]
LISTS = "() (-1,) (0,) (0.5,) (2,1) ('x',) ('x','x') (1,2,3) (None,) (9,9,9,9) ('',) (('x',),)".split()
LISTS += r"('\ud800',) ('a=b',) ('p2','p9') ('res2',) ('root_val',) {1:2} [[1]] 1,2".split()
TEXTS = r"""None true '' x {} 2024-01-01 \ud800 ' " < &a; .. /dev/zero / ~ - $^{ *a""".split()
TEXTS += ["", "\0", "\ud800", "\u202e", "x" * 5000, "[" * 30_000, "{a: " * 3000, "(" * 300, "&a [*a]"]
TEXTS += [f"!!python/object/apply:os.mkdir [{CANARY}]", *NUMBERS, *LISTS]
BOMBS = ["names: &n [*n]\n", "_BASE_: config.yaml\n", "_BASE_: ./../case/./config.yaml\n", "<!DOCTYPE a>"]
for first, more in (("{z: 1}", "{{x: *a{0}, y: *a{0}}}"), ("[1]", "[*a{0}, *a{0}, *a{0}, *a{0}]")):
    lines = (f"a{n + 1}: &a{n + 1} {more.format(n)}\n" for n in range(25))
    BOMBS.append(f"a0: &a0 {first}\n{''.join(lines)}")


class Payload:
    """Makes a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, (CANARY,)


NAN = float("nan")
OBJECTS = [None, True, -1, 0, 2, 0.5, NAN, 10**30, "", "x" * 5000, b"x", [], [1, "a"], {}, {"a": 1}, {1: 2}]
OBJECTS += [(1, 2), Payload(), np.zeros(0), np.full(2, NAN), np.ones(3, np.int64), np.array(["a"])]
TENSORS = [torch.zeros(0), torch.full((2,), NAN), torch.ones(3, dtype=torch.int64), torch.eye(2).to_sparse()]
TENSORS += [torch.zeros(1).expand(2**40), torch.empty(3, device="meta"), torch.ones(2, dtype=torch.cfloat)]


def spoilt(name: str, content: bytes, rng: random.Random, others: list[bytes]) -> bytes | None:
    """The file, spoilt; None: something else than a file is to take its place."""
    kind, suffix = rng.randrange(12), Path(name).suffix
    if kind == 0:
        return None
    if kind == 1:
        return rng.choice([b"", b"\0" * 99, b"hello", b"\xff\xfe\xff", pickle.dumps(Payload()), *others])
    if kind < 6 or not content:
        return damaged(content, rng)
    swaps = {".pth": object_swapped, ".pkl": object_swapped, ".pt2": member_changed}
    swaps |= dict.fromkeys((".json", ".xml", ".txt", ".yaml"), token_swapped)
    return swaps.get(suffix, number_changed)(content, rng)


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Bits flipped, cut short, or a piece repeated, lost or overwritten."""
    data, start, length = bytearray(content), rng.randrange(len(content) + 1), rng.choice([1, 4, 8, 200])
    kind = rng.randrange(4)
    if kind == 0:
        return content[:start]
    if kind == 1:
        piece = rng.choice([b"", content[start : start + length] * 2, b"\xff" * length, b"\0" * length])
        return content[:start] + piece + content[start + length :]
    for _ in range(rng.choice([1, 1, 4, 64]) if data else 0):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def number_changed(content: bytes, rng: random.Random) -> bytes:
    """A number of 2 or 4 bytes in the header; of what is compressed by gzip, inside of it."""
    if content[:2] == b"\x1f\x8b":
        return gzip.compress(number_changed(gzip.decompress(content), rng), 1)
    data, place = bytearray(content.ljust(64, b"\0")), rng.randrange(60)
    struct.pack_into(rng.choice(["<H", ">H", "<I", ">I"]), data, place, rng.choice([0, 1, 2, 255, 65_535]))
    return bytes(data)


def token_swapped(content: bytes, rng: random.Random) -> bytes:
    text = content.decode("utf-8", "replace")
    words = [match.span() for match in re.finditer(r'"[^"]*"|[\w.\-]+|\[.*?\]', text)]
    if rng.random() < 0.1 or not words:
        return (rng.choice(BOMBS) + text).encode()
    start, end = rng.choice(words)
    return (text[:start] + rng.choice(TEXTS) + text[end:]).encode("utf-8", "surrogatepass")


def object_swapped(content: bytes, rng: random.Random) -> bytes:
    """A pickle, or what torch saved, with something else in one place."""
    is_zip, file = content[:2] == b"PK", io.BytesIO()
    is_torch = is_zip or b"torch" in content[:999]
    tree = torch.load(io.BytesIO(content)) if is_torch else pickle.loads(content)  # noqa: S301
    holder, key = rng.choice(list(places(tree)))
    value, kind = rng.choice(TENSORS if is_torch and rng.random() < 0.5 else OBJECTS), rng.randrange(10)
    old, holder[key] = holder[key], value
    if kind < 2:  # lost, or under another name
        del holder[key]
    if kind == 1 and isinstance(holder, dict):
        holder[rng.choice([1, None, "x", ("a",)])] = old
    if is_torch:
        torch.save(tree, file, _use_new_zipfile_serialization=is_zip)
    else:
        pickle.dump(tree, file, rng.choice([2, 4]))
    return file.getvalue()


def places(tree: Any, weight: int = 12) -> Iterator[tuple[Any, Any]]:
    """Where something can be put: a dict or list and a key of it, those higher up more often."""
    keys = list(tree)[:60] if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in keys:
        yield from [(tree, key)] * weight
        yield from places(tree[key], max(weight - 4, 1))


def member_changed(content: bytes, rng: random.Random) -> bytes:
    """Of an archive, one member changed and packed again with the right checksum."""
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(file := io.BytesIO(), "w") as target:
        chosen = rng.choice(source.namelist())
        for name in source.namelist():
            data, change = source.read(name), token_swapped if name.endswith(".json") else damaged
            target.writestr(name, change(data, rng) if name == chosen else data)
    return file.getvalue()


def put(path: Path, content: bytes | None, rng: random.Random) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if content is not None:
        path.write_bytes(content)
        return
    make = [path.mkdir, lambda: None, lambda: path.symlink_to("/dev/zero"), lambda: path.symlink_to(path)]
    make += [] if path.suffix == ".yaml" else [lambda: os.mkfifo(path)]  # a config may come through a pipe
    rng.choice(make)()
