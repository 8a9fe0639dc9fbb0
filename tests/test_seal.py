"""Sealed files open to the same bytes, in any range, with the right secret, and in no other way."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.checkpoint import seal as module
from engine.checkpoint.seal import HEAD_BYTES, Seal, hkdf, sealed_bytes
from engine.errors import CheckpointError

SECRET = bytes(range(32))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", 16)


def sealed(content: bytes, what: str = "step/file", secret: bytes = SECRET, cut: int = 5) -> bytes:
    cipher = Seal(secret).new_cipher(what, len(content))
    return b"".join(cipher.seal(content[i : i + cut] for i in range(0, len(content), cut)))


def reader(raw: bytes) -> Callable[[int, int], bytes]:
    return lambda offset, size: raw[offset : offset + size]


def opened(raw: bytes, begin: int, end: int, what: str = "step/file", secret: bytes = SECRET) -> bytes:
    return Seal(secret).cipher_of(what, raw[:HEAD_BYTES]).open_range(reader(raw), begin, end)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=100), st.integers(1, 60), st.data())
def test_any_range_opens_to_the_content(content: bytes, cut: int, data: st.DataObject) -> None:
    raw = sealed(content, cut=cut)
    assert len(raw) == sealed_bytes(len(content))
    begin = data.draw(st.integers(0, len(content)))
    end = data.draw(st.integers(begin, len(content)))
    assert opened(raw, begin, end) == content[begin:end]
    assert len(content) < 8 or content[:8] not in raw[HEAD_BYTES:]


def test_every_change_of_every_byte_is_found() -> None:
    raw = sealed(bytes(40))
    for place in range(len(raw)):
        changed = raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :]
        with pytest.raises(CheckpointError, match="step/file: "):
            opened(changed, 0, 40)


def test_another_secret_name_order_or_length_is_refused() -> None:
    raw = sealed(bytes(64))
    head, chunk = raw[:HEAD_BYTES], 32
    for wrong in (
        raw[:-1],
        head + raw[HEAD_BYTES + chunk : HEAD_BYTES + 2 * chunk] + raw[HEAD_BYTES : HEAD_BYTES + chunk],
    ):
        with pytest.raises(CheckpointError, match="changed or damaged"):
            opened(wrong, 0, 64)
    with pytest.raises(CheckpointError, match="secret is another one"):
        opened(raw, 0, 64, secret=bytes(32))
    with pytest.raises(CheckpointError, match="other/file"):
        opened(raw, 0, 64, what="other/file")
    with pytest.raises(CheckpointError, match="not a sealed file"):
        opened(b"plain safetensors", 0, 1)
    with pytest.raises(CheckpointError, match="bytes 0 to 65 of 64"):
        opened(raw, 0, 65)


def test_no_two_files_are_alike_and_no_secret_is_shown() -> None:
    assert sealed(bytes(64)) != sealed(bytes(64))
    seal = Seal(SECRET)
    assert SECRET.hex() not in repr(seal) and repr(SECRET) not in repr(seal)
    assert "key" not in repr(seal.new_cipher("x", 1))
    with pytest.raises(CheckpointError, match="has 31 bytes, at least 32"):
        Seal(bytes(31))


def test_signatures() -> None:
    seal = Seal(SECRET)
    signature = seal.sign(b"manifest")
    assert seal.is_signed(b"manifest", signature)
    assert not seal.is_signed(b"manifesT", signature) and not seal.is_signed(b"manifest", signature[:-1] + "z")
    assert not Seal(bytes(32)).is_signed(b"manifest", signature)


def test_hkdf_is_that_of_rfc_5869() -> None:
    key = hkdf(b"\x0b" * 22, bytes(range(13)), bytes(range(0xF0, 0xFA)))
    assert key.hex() == "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf"
