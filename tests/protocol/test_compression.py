from __future__ import annotations

import gzip
import time
import tracemalloc
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayprism.errors import InvalidInput, TooLarge
from rayprism.protocol.compression import (
    ENCODINGS,
    Encoding,
    choose_encoding,
    compress,
    decompress,
)

TEXT = b'{"inputs": [1, 2, 3]}' * 50


def raw_deflate(body: bytes) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return packer.compress(body) + packer.flush()


PACKED = {
    "gzip": gzip.compress(TEXT, mtime=0),
    "x-gzip": gzip.compress(TEXT, mtime=0),
    "GZIP ": gzip.compress(TEXT, mtime=0),
    "deflate": zlib.compress(TEXT),
    "Deflate": raw_deflate(TEXT),
    "identity": TEXT,
    "": TEXT,
}


@pytest.mark.parametrize("encoding", PACKED)
def test_decompress(encoding: str) -> None:
    assert decompress(PACKED[encoding], encoding, len(TEXT)) == TEXT


@pytest.mark.parametrize("encoding", PACKED)
def test_one_byte_over_the_limit(encoding: str) -> None:
    with pytest.raises(TooLarge, match=str(len(TEXT) - 1)):
        decompress(PACKED[encoding], encoding, len(TEXT) - 1)


@settings(deadline=None, max_examples=50)
@given(st.binary(max_size=3000), st.sampled_from(ENCODINGS), st.integers(0, 3000))
def test_round_trip(body: bytes, encoding: Encoding, limit: int) -> None:
    packed = compress(body, encoding)
    if len(body) <= limit:
        assert decompress(packed, encoding, limit) == body
    else:
        with pytest.raises(TooLarge):
            decompress(packed, encoding, limit)


@settings(deadline=None, max_examples=50)
@given(st.binary(max_size=3000), st.integers(0, 9))
def test_raw_deflate_is_never_taken_for_zlib(body: bytes, level: int) -> None:
    packer = zlib.compressobj(level, zlib.DEFLATED, -15)
    assert decompress(packer.compress(body) + packer.flush(), "deflate", 3000) == body


def test_stock_decoders_read_what_we_compress() -> None:
    assert gzip.decompress(compress(TEXT, "gzip")) == TEXT
    assert zlib.decompress(compress(TEXT, "deflate")) == TEXT
    assert compress(TEXT, "gzip") == compress(TEXT, "gzip")


def bomb(wbits: int, megabytes: int) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, wbits)
    chunk = bytes(1024 * 1024)
    return b"".join(packer.compress(chunk) for _ in range(megabytes)) + packer.flush()


@pytest.mark.parametrize(("encoding", "wbits"), [("gzip", 31), ("deflate", 15), ("deflate", -15)])
def test_a_bomb_is_not_inflated(encoding: str, wbits: int) -> None:
    packed = bomb(wbits, 30)
    assert len(packed) < 50_000
    tracemalloc.start()
    try:
        with pytest.raises(TooLarge):
            decompress(packed, encoding, 1024 * 1024)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * 1024 * 1024


def test_members_of_gzip_are_joined() -> None:
    packed = gzip.compress(TEXT) + gzip.compress(b"") + gzip.compress(b"end")
    assert decompress(packed, "gzip", 10_000) == TEXT + b"end"
    with pytest.raises(TooLarge):
        decompress(packed, "gzip", len(TEXT) + 2)


def test_very_many_members_are_refused_soon() -> None:
    packed = gzip.compress(b"") * 500_000
    started = time.perf_counter()
    with pytest.raises(InvalidInput, match="left over"):
        decompress(packed, "gzip", 10_000)
    assert time.perf_counter() - started < 2


def test_bodies_longer_than_one_chunk() -> None:
    body = bytes(range(256)) * 4096
    noise = zlib.compress(body, 0)
    assert len(noise) > 1024 * 1024
    assert decompress(noise, "deflate", len(body)) == body


@pytest.mark.parametrize(
    ("body", "encoding", "message"),
    [
        (b"", "gzip", "ends too early"),
        (b"", "deflate", "ends too early"),
        (PACKED["gzip"][:-1], "gzip", "ends too early"),
        (PACKED["gzip"][:20], "gzip", "ends too early"),
        (PACKED["deflate"][:-1], "deflate", "ends too early"),
        (raw_deflate(TEXT)[:-1], "deflate", "ends too early"),
        (PACKED["gzip"] + b"x", "gzip", "1 bytes left over"),
        (PACKED["gzip"] + b"\x1f\x8b", "gzip", "ends too early"),
        (PACKED["deflate"] + b"xy", "deflate", "2 bytes left over"),
        (raw_deflate(TEXT) + b"xyz", "deflate", "3 bytes left over"),
        (TEXT, "gzip", "body is not gzip"),
        (TEXT, "deflate", "body is not deflate"),
        (PACKED["deflate"], "gzip", "body is not gzip"),
        (PACKED["gzip"][:-8] + bytes(8), "gzip", "body is not gzip"),
        (PACKED["deflate"][:-1] + b"?", "deflate", "body is not deflate"),
        (TEXT, "br", "is 'br', allowed are gzip, deflate and identity"),
        (TEXT, "gzip, deflate", "is 'gzip, deflate', allowed are gzip"),
        (TEXT, "z" * 1000, "allowed are gzip"),
    ],
)
def test_faults(body: bytes, encoding: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message) as caught:
        decompress(body, encoding, 10_000)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("accepted", "chosen"),
    [
        (None, None),
        ("", None),
        ("gzip", "gzip"),
        ("deflate", "deflate"),
        ("GZip", "gzip"),
        ("x-gzip", "gzip"),
        ("br", None),
        ("br, zstd", None),
        ("gzip, deflate, br", "gzip"),
        ("deflate, gzip", "gzip"),
        ("gzip;q=0.5, deflate", "deflate"),
        ("gzip;q=0.5,deflate;q=0.4", "gzip"),
        ("gzip; q=0.2 , deflate; Q=0.9", "deflate"),
        ("gzip;q=0", None),
        ("gzip;q=0.0, deflate;q=0.000", None),
        ("gzip;q=0, deflate", "deflate"),
        ("*", "gzip"),
        ("*;q=0", None),
        ("gzip;q=0, *", "deflate"),
        ("deflate;q=0.3, *;q=0.2", "deflate"),
        ("identity", None),
        ("identity, gzip", "gzip"),
        ("identity;q=1, gzip;q=0.5", None),
        ("identity;q=0.5, gzip;q=0.5", "gzip"),
        ("gzip;q=high", None),
        ("gzip;q=2", None),
        ("gzip;q=-1", None),
        ("gzip;q=nan", None),
        (";;,,=,q=1", None),
        ("gzip;level=9", "gzip"),
    ],
)
def test_choose_encoding(accepted: str | None, chosen: str | None) -> None:
    assert choose_encoding(accepted) == chosen
