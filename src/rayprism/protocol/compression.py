"""Compressed bodies: gzip and deflate, inflated only as far as they are allowed to grow."""

from __future__ import annotations

import zlib
from typing import Literal

from rayprism.errors import InvalidInput, TooLarge

__all__ = ["ENCODINGS", "Encoding", "choose_encoding", "compress", "decompress"]

Encoding = Literal["gzip", "deflate"]
ENCODINGS: tuple[Encoding, ...] = ("gzip", "deflate")
"""The codings that are offered, the preferred one first."""

_GZIP, _ZLIB, _RAW = 31, 15, -15
"""zlib's `wbits`: with a gzip header, with a zlib header, with none."""
_GZIP_MAGIC = b"\x1f\x8b"
_CHUNK_BYTES = 64 * 1024
_MAX_MEMBERS = 1024
_LEVEL = 1
"""Tensors as JSON shrink to 49 % at level 1 and to 47 % at level 6, which takes seven times as
long; measured with 20,000 normally distributed floats."""


def decompress(body: bytes | memoryview, encoding: str, limit_bytes: int) -> bytes | memoryview:
    """Inflates a body.

    Args:
        body: As it came.
        encoding: The value of the header Content-Encoding. `deflate` may come with or without
            zlib's header: clients send both.
        limit_bytes: Most bytes that it may have; inflating stops there.

    Raises:
        TooLarge: It is larger than the limit.
        InvalidInput: The encoding is unknown, or the body is corrupt, cut short, or has bytes left
            over.

    Source: RFC 9110, section 8.4.1; RFC 1950 and 1952.
    """
    name = encoding.strip().lower()
    if name in ("", "identity"):
        if len(body) > limit_bytes:
            raise _too_large(limit_bytes, "body")
        return body
    if name in ("gzip", "x-gzip"):
        return _inflate(body, "gzip", _GZIP, limit_bytes)
    if name == "deflate":
        return _inflate(body, name, _ZLIB if _has_zlib_header(body) else _RAW, limit_bytes)
    raise InvalidInput(
        f"header Content-Encoding is {encoding[:40]!r}, allowed are {', '.join(ENCODINGS)} and "
        "identity, one of them"
    )


def _has_zlib_header(body: bytes | memoryview) -> bool:
    # A raw stream never starts like this: it would be a stored block with padding that is not 0.
    return len(body) >= 2 and body[0] & 0x0F == 8 and (body[0] << 8 | body[1]) % 31 == 0


def _inflate(body: bytes | memoryview, name: str, wbits: int, limit_bytes: int) -> bytes:
    inflater = zlib.decompressobj(wbits)
    parts: list[bytes] = []
    room = limit_bytes
    position, members = 0, 1
    while position < len(body):
        if inflater.eof:
            members += 1
            if (
                wbits != _GZIP
                or members > _MAX_MEMBERS
                or body[position : position + 2] != _GZIP_MAGIC
            ):
                raise InvalidInput(
                    f"the body has {len(body) - position} bytes left over behind its end "
                    f"(Content-Encoding: {name})"
                )
            inflater = zlib.decompressobj(wbits)
        chunk = body[position : position + _CHUNK_BYTES]
        try:
            part = inflater.decompress(chunk, room + 1)
        except zlib.error as error:
            raise InvalidInput(f"the body is not {name}: {error}") from None
        room -= len(part)
        if room < 0:
            raise _too_large(limit_bytes, "inflated body")
        parts.append(part)
        # What is not consumed otherwise lies in the inflater, as long as there is room.
        position += len(chunk) - len(inflater.unused_data)
    if not inflater.eof:
        raise InvalidInput(f"the body ends too early (Content-Encoding: {name})")
    return b"".join(parts)


def _too_large(limit_bytes: int, what: str) -> TooLarge:
    return TooLarge(f"the {what} is larger than {limit_bytes} bytes, which is the most allowed")


def choose_encoding(accept_encoding: str | None) -> Encoding | None:
    """The coding for an answer, from what the client accepts.

    Args:
        accept_encoding: The value of the header Accept-Encoding; None where it is missing.

    Returns:
        The coding with the highest weight, gzip before deflate; None for none, also where the
        client would rather have none.

    Source: RFC 9110, section 12.5.3. Where the client names no weight for no coding at all, any
    coding that it accepts is better.
    """
    if not accept_encoding:
        return None
    weights: dict[str, float] = {}
    for item in accept_encoding.split(","):
        name, _, rest = item.partition(";")
        weight = _weight(rest)
        if weight is not None:
            weights[name.strip().lower()] = weight
    if "x-gzip" in weights:
        weights.setdefault("gzip", weights["x-gzip"])
    anything = weights.get("*", 0.0)
    best: Encoding | None = None
    best_weight = 0.0
    for encoding in ENCODINGS:
        weight = weights.get(encoding, anything)
        if weight > best_weight:
            best, best_weight = encoding, weight
    return None if weights.get("identity", 0.0) > best_weight else best


def _weight(parameters: str) -> float | None:
    for parameter in parameters.split(";"):
        name, _, value = parameter.partition("=")
        if name.strip().lower() == "q":
            try:
                weight = float(value.strip())
            except ValueError:
                return None
            return weight if 0 <= weight <= 1 else None
    return 1.0


def compress(body: bytes, encoding: Encoding) -> bytes:
    """Compresses an answer. `deflate` has zlib's header, as its RFC and stock clients want it."""
    deflater = zlib.compressobj(_LEVEL, zlib.DEFLATED, _GZIP if encoding == "gzip" else _ZLIB)
    return deflater.compress(body) + deflater.flush()
