"""Encryption at rest and signatures for checkpoints that are confidential: AES-256-GCM and HMAC-SHA256.

Goal: who has the files but not the secret can neither read weights nor change, swap, shorten or mix files unnoticed.
One secret of at least 32 bytes serves both; keys are derived from it by HKDF-SHA256 (RFC 5869), a new one for every
file from 32 random bytes in its head, so that no nonce is ever used twice under one key. The secret itself is in no
config, manifest or log: `engine.launch.read_secret` reads it from a file or an environment variable.

A sealed file, so that any range of it can be read without the rest:

    0   8 bytes  magic "TRDSEAL1"
    8   32       salt, random: the file's key is HKDF(secret, salt, info = what the file is)
    40  u64      bytes of the content, little-endian
    48  chunks of 1 MiB of content (the last one shorter), each followed by its 16-byte tag;
        nonce: number of the chunk; authenticated with it: the head

A chunk that was moved, or a file that was cut or extended, fails like a flipped bit. *Which* file it is (checkpoint and
name) goes into the key, so that files of two checkpoints cannot be exchanged.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from engine.errors import CheckpointError

MAGIC = b"TRDSEAL1"
SALT_BYTES, TAG_BYTES, CHUNK_BYTES = 32, 16, 1 << 20
HEAD_BYTES = len(MAGIC) + SALT_BYTES + 8
MIN_SECRET_BYTES = 32
_SIGN = b"trident checkpoint manifest v1"
_SEAL = b"trident checkpoint file v1 "


def sealed_bytes(content_bytes: int) -> int:
    """Size of the sealed file of so many bytes of content."""
    return HEAD_BYTES + content_bytes + TAG_BYTES * -(-content_bytes // CHUNK_BYTES)


def hkdf(secret: bytes, salt: bytes, info: bytes) -> bytes:
    """32 bytes from a secret (RFC 5869 with SHA-256, one block)."""
    pseudo_random = hmac.digest(salt or bytes(32), secret, "sha256")
    return hmac.digest(pseudo_random, info + b"\x01", "sha256")


@dataclass(frozen=True)
class Seal:
    """What a secret can do. Its repr does not show it."""

    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.secret) < MIN_SECRET_BYTES:
            raise CheckpointError(
                f"the secret has {len(self.secret)} bytes, at least {MIN_SECRET_BYTES} are needed: make one with "
                f"`head -c 32 /dev/urandom > FILE` and chmod 600 FILE"
            )

    @cached_property
    def _sign_key(self) -> bytes:
        return hkdf(self.secret, b"", _SIGN)

    def sign(self, text: bytes) -> str:
        """HMAC-SHA256 of a manifest, hexadecimal."""
        return hmac.new(self._sign_key, text, hashlib.sha256).hexdigest()

    def is_signed(self, text: bytes, signature: str) -> bool:
        """Whether `signature` is that of `text`, in constant time."""
        return hmac.compare_digest(self.sign(text), signature)

    def new_cipher(self, what: str, content_bytes: int) -> Cipher:
        """To seal a new file; `what` says which (checkpoint and name)."""
        salt = secrets.token_bytes(SALT_BYTES)
        head = MAGIC + salt + content_bytes.to_bytes(8, "little")
        return Cipher(hkdf(self.secret, salt, _SEAL + what.encode()), head, what)

    def cipher_of(self, what: str, head: bytes) -> Cipher:
        """To read a sealed file that begins with `head`. Raises CheckpointError if that is none."""
        if len(head) < HEAD_BYTES or not head.startswith(MAGIC):
            raise CheckpointError(f"{what}: is not a sealed file; it was replaced or damaged")
        head = head[:HEAD_BYTES]
        salt = head[len(MAGIC) : len(MAGIC) + SALT_BYTES]
        return Cipher(hkdf(self.secret, salt, _SEAL + what.encode()), head, what)


@dataclass(frozen=True)
class Cipher:
    """One sealed file: its key, its first bytes, and which file it is."""

    key: bytes = field(repr=False)
    head: bytes
    what: str

    @property
    def content_bytes(self) -> int:
        """Bytes of the content, as the head says."""
        return int.from_bytes(self.head[-8:], "little")

    @cached_property
    def _aes(self) -> Any:
        return _aes_gcm()(self.key)

    def close_chunk(self, number: int, content: bytes | bytearray | memoryview) -> bytes:
        """Chunk `number`, sealed: its bytes of content and a tag."""
        return self._aes.encrypt(number.to_bytes(12, "little"), content, self.head)

    def open_chunk(self, number: int, raw: bytes | bytearray | memoryview) -> bytes:
        """The content of a sealed chunk. Raises CheckpointError if it is not the one that was written."""
        from cryptography.exceptions import InvalidTag

        try:
            return self._aes.decrypt(number.to_bytes(12, "little"), raw, self.head)
        except (InvalidTag, ValueError):
            raise CheckpointError(
                f"{self.what}: bytes {number * CHUNK_BYTES} and on cannot be opened: the file was changed or damaged, "
                f"or the secret is another one"
            ) from None


def _aes_gcm() -> Any:
    try:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    except ImportError:
        raise CheckpointError(
            "encrypted checkpoints need the package cryptography: pip install 'trident-engine[secure]'"
        ) from None
    return AESGCM
