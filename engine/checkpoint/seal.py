"""Signed and encrypted checkpoints: a storage layer with HMAC-SHA256 and AES-256-GCM.

Goal: an attacker who has the files but not the secret cannot change, swap, truncate or mix them undetected (signed),
and cannot read weights, names or config (encrypted). One secret of at least 32 bytes serves both; keys are derived from
it with HKDF-SHA256 (RFC 5869). The secret itself is never written to a config, manifest or log (see `read_secret`).

Signed: every digest of a checkpoint (manifest, headers, blocks) is an HMAC instead of an XXH3-128, so it cannot be
computed without the secret. Nothing else differs; tensors stay plain safetensors.

Encrypted: signed, and each file is sealed in chunks, so that any range can be read without the rest:

    0   8 bytes  magic "TRDSEAL1"
    8   32       random salt: the file's key is HKDF(secret, salt, info = file name), so no nonce is used twice
    40  u64      bytes of the content, little-endian
    48  chunks of 1 MiB of content (the last one shorter), each followed by its 16-byte tag;
        nonce: number of the chunk; additional authenticated data: the first 48 bytes

A moved chunk and a truncated or extended file are detected like a flipped bit. A file of another checkpoint can be
decrypted, but does not match the digests in this checkpoint's manifest.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from engine.checkpoint.storage import DISK, Hasher, Status, Storage, StoredFile, Writer, ignore_piece
from engine.distributed.env import secret_variable
from engine.errors import CheckpointError, ConfigError, FieldError, WrongSecretError
from engine.util.files import SEALED

SIGNED = "hmac_sha256"  # digest name of signed checkpoints
SALT_BYTES, TAG_BYTES, CHUNK_BYTES = 32, 16, 1 << 20
HEAD_BYTES = len(SEALED) + SALT_BYTES + 8
MIN_SECRET_BYTES = 32


def open_storage(reference: str, *, encrypt: bool = False) -> Storage:
    """DISK, or with a reference to a secret (file:PATH or env:NAME) a storage that signs and, if asked, encrypts.

    Raises ConfigError or CheckpointError if the secret does not exist or is too short.
    """
    return SecretStorage(Seal(read_secret(reference)), encrypt=encrypt) if reference else DISK


def read_secret(reference: str) -> bytes:
    """Read the secret that file:PATH or env:NAME refers to. Errors show neither the secret nor an invalid reference.

    Raises ConfigError if it does not exist, or is in a file that other users may read.
    """
    kind, colon, name = reference.partition(":")
    if not colon or not name or kind not in ("file", "env"):
        invalid = FieldError(
            "checkpoint.secret-no-reference",
            "secret",
            "...",
            "is neither file:PATH nor env:NAME",
            "Give the place of the secret, not the secret.",
        )
        raise ConfigError([invalid])
    if kind == "env":
        if (secret := secret_variable(name)) is None:
            invalid = FieldError(
                "checkpoint.secret-not-set", "secret", reference, "is not set", "Set it to at least 32 characters."
            )
            raise ConfigError([invalid])
        return secret
    try:
        if Path(name).stat().st_mode & 0o077:
            problem = "may be read by other users than its owner"
            raise ConfigError([FieldError("checkpoint.secret-open", "secret", reference, problem, f"chmod 600 {name}")])
        return Path(name).read_bytes()
    except OSError as error:
        problem = f"cannot be read: {error.strerror}"
        invalid = FieldError(
            "checkpoint.secret-unreadable", "secret", reference, problem, "Give a file of at least 32 bytes."
        )
        raise ConfigError([invalid]) from None


def sealed_bytes(content_bytes: int) -> int:
    """Size in bytes of a sealed file with `content_bytes` of content."""
    return HEAD_BYTES + content_bytes + TAG_BYTES * -(-content_bytes // CHUNK_BYTES)


def hkdf(secret: bytes, salt: bytes, info: bytes) -> bytes:
    """Derive 32 bytes from a secret (HKDF of RFC 5869 with SHA-256, one block)."""
    pseudo_random = hmac.digest(salt or bytes(32), secret, "sha256")
    return hmac.digest(pseudo_random, info + b"\x01", "sha256")


@dataclass(frozen=True)
class Seal:
    """Signs and encrypts with a secret, which its repr does not show."""

    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.secret) < MIN_SECRET_BYTES:
            raise CheckpointError(
                "checkpoint.secret-too-short",
                f"the secret has {len(self.secret)} bytes, at least {MIN_SECRET_BYTES} are needed: make one with "
                f"`head -c 32 /dev/urandom > FILE` and `chmod 600 FILE`",
            )

    @cached_property
    def _sign_key(self) -> bytes:
        return hkdf(self.secret, b"", b"trident checkpoint digest v1")

    def sign(self, data: bytes | bytearray | memoryview = b"") -> Hasher:
        """HMAC-SHA256 of `data` and of all bytes added by `update` later."""
        return hmac.new(self._sign_key, data, hashlib.sha256)

    def new_cipher(self, file: Path, content_bytes: int) -> Cipher:
        """Cipher for a new file, with a random salt."""
        head = SEALED + secrets.token_bytes(SALT_BYTES) + content_bytes.to_bytes(8, "little")
        return self.cipher_for(file, head)

    def cipher_for(self, file: Path, head: bytes) -> Cipher:
        """Cipher for an existing sealed file that starts with `head`."""
        salt = head[len(SEALED) : len(SEALED) + SALT_BYTES]
        key = hkdf(self.secret, salt, b"trident checkpoint file v1 " + file.name.encode())
        return Cipher(key, head, file)


@dataclass(frozen=True)
class Cipher:
    """Encrypts and decrypts chunks of one sealed file. head: its first 48 bytes."""

    key: bytes = field(repr=False)
    head: bytes
    file: Path

    @property
    def content_bytes(self) -> int:
        """Bytes of the content, as stated in the head."""
        return int.from_bytes(self.head[-8:], "little")

    @cached_property
    def _aes(self) -> Any:
        try:
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        except ImportError:
            text = "encrypted checkpoints need the package cryptography: pip install 'trident-engine[secure]'"
            raise CheckpointError("checkpoint.cryptography-missing", text) from None
        return AESGCM(self.key)

    def encrypt_chunk(self, number: int, content: bytes | bytearray | memoryview) -> bytes:
        """Encrypt chunk `number`: ciphertext followed by its tag."""
        return self._aes.encrypt(number.to_bytes(12, "little"), content, self.head)

    def decrypt_chunk(self, number: int, raw: bytes | bytearray | memoryview) -> bytes:
        """Decrypt chunk `number`. Raises WrongSecretError if it was changed or the secret is another one."""
        aes = self._aes
        from cryptography.exceptions import InvalidTag

        try:
            return aes.decrypt(number.to_bytes(12, "little"), raw, self.head)
        except InvalidTag:
            raise WrongSecretError(
                "checkpoint.sealed-chunk-not-opened",
                f"{self.file}: the content from byte {number * CHUNK_BYTES} on cannot be decrypted: the file was "
                "changed or damaged, or the secret is wrong",
            ) from None


class _SealedWriter:
    """Encrypts and writes full chunks; the last, shorter one is written by `sync`."""

    def __init__(self, inner: Writer, cipher: Cipher):
        self._inner, self._cipher = inner, cipher
        self._number, self._pending = 0, bytearray()
        inner.write(memoryview(cipher.head))

    def write(self, data: memoryview) -> None:
        data = data.cast("B")
        while len(data):
            if not self._pending and len(data) >= CHUNK_BYTES:  # full chunks are not copied
                self._put(data[:CHUNK_BYTES])
                data = data[CHUNK_BYTES:]
                continue
            take = CHUNK_BYTES - len(self._pending)
            self._pending += data[:take]
            data = data[take:]
            if len(self._pending) == CHUNK_BYTES:
                self._flush()

    def sync(self) -> None:
        self._flush()
        self._inner.sync()

    def close(self) -> None:
        self._inner.close()

    def _flush(self) -> None:
        if self._pending:
            self._put(self._pending)
            self._pending = bytearray()

    def _put(self, chunk: bytearray | memoryview) -> None:
        self._inner.write(memoryview(self._cipher.encrypt_chunk(self._number, chunk)))
        self._number += 1


class _SealedFile:
    """Decrypts ranges of a sealed file. size: of the content."""

    def __init__(self, inner: StoredFile, cipher: Cipher):
        self._inner, self._cipher, self.size = inner, cipher, cipher.content_bytes
        if inner.size != sealed_bytes(self.size):
            raise CheckpointError(
                "checkpoint.sealed-size-differs",
                f"{cipher.file}: has {inner.size} bytes, but its head states {sealed_bytes(self.size)}; it was "
                "truncated, extended or damaged",
            )

    def read_into(self, offset: int, into: memoryview, on_piece: Callable[[memoryview], None] = ignore_piece) -> None:
        into, filled = into.cast("B"), 0
        while filled < len(into):
            number, skip = divmod(offset + filled, CHUNK_BYTES)
            size = min(CHUNK_BYTES, self.size - number * CHUNK_BYTES)
            raw = bytearray(max(0, size) + TAG_BYTES)
            self._inner.read_into(HEAD_BYTES + number * (CHUNK_BYTES + TAG_BYTES), memoryview(raw))
            content = memoryview(self._cipher.decrypt_chunk(number, raw))[skip : skip + len(into) - filled]
            into[filled : filled + len(content)] = content
            on_piece(into[filled : filled + len(content)])
            filled += len(content)

    def close(self) -> None:
        self._inner.close()


class SecretStorage:
    """Storage whose digests are signatures. encrypt: new files are encrypted too. Reads plain and encrypted files."""

    digest_name = SIGNED

    def __init__(self, seal: Seal, inner: Storage = DISK, *, encrypt: bool = False):
        self._seal, self._inner, self._encrypt = seal, inner, encrypt
        self.make_folder, self.sync_folder, self.rename = inner.make_folder, inner.sync_folder, inner.rename
        self.unlink, self.remove_folder, self.list = inner.unlink, inner.remove_folder, inner.list
        self.free_bytes = inner.free_bytes

    def digest(self, data: bytes | bytearray | memoryview) -> str:
        return self._seal.sign(data).hexdigest()

    def hasher(self) -> Hasher:
        return self._seal.sign()

    def create(self, path: Path, size: int) -> Writer:
        if not self._encrypt:
            return self._inner.create(path, size)
        cipher = self._seal.new_cipher(path, size)
        return _SealedWriter(self._inner.create(path, sealed_bytes(size)), cipher)

    def open(self, path: Path, *, uncached: bool = False) -> StoredFile:
        source = self._inner.open(path, uncached=uncached)
        try:
            head = bytearray(min(source.size, HEAD_BYTES))
            source.read_into(0, memoryview(head))
            if not head.startswith(SEALED):
                return source
            return _SealedFile(source, self._seal.cipher_for(path, bytes(head)))
        except BaseException:
            source.close()
            raise

    def stat(self, path: Path) -> Status | None:
        status = self._inner.stat(path)
        if status is None or status.kind != "file":
            return status
        source = self.open(path)
        try:
            return Status("file", source.size)
        finally:
            source.close()
