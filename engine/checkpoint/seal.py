"""Signed and encrypted checkpoints: HMAC-SHA256 and AES-256-GCM in a storage layer, for what is confidential.

Goal: who has the files but not the secret cannot change, swap, shorten or mix them unnoticed (signed), nor read
weights, names or config (encrypted). One secret of at least 32 bytes serves both; keys are derived from it by
HKDF-SHA256 (RFC 5869). The secret itself is in no config, manifest or log (see `read_secret`).

Signed: every digest of a checkpoint (of the manifest, of headers, of blocks) is an HMAC instead of an XXH3-128, so that
nobody can make one without the secret. Nothing else differs, and tensors stay plain safetensors.

Encrypted: signed, and each file is sealed, so that any range of it can be read without the rest:

    0   8 bytes  magic "TRDSEAL1"
    8   32       salt, random: the file's key is HKDF(secret, salt, info = its name), so no nonce ever serves twice
    40  u64      bytes of the content, little-endian
    48  chunks of 1 MiB of content (the last one shorter), each followed by its 16-byte tag;
        nonce: number of the chunk; authenticated with it: the head

A chunk that was moved, or a file that was cut or extended, fails like a flipped bit; a file of another checkpoint
opens, and then does not have the digests of this one's manifest.
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

from engine.checkpoint.storage import DISK, Hasher, Status, Storage, StoredFile, Writer, unseen
from engine.distributed.env import secret_variable
from engine.errors import CheckpointError, ConfigError, FieldError, WrongSecretError
from engine.util.files import SEALED

SIGNED = "hmac_sha256"  # the kind of digest that signs
SALT_BYTES, TAG_BYTES, CHUNK_BYTES = 32, 16, 1 << 20
HEAD_BYTES = len(SEALED) + SALT_BYTES + 8
MIN_SECRET_BYTES = 32


def storage_of(reference: str, *, encrypt: bool = False) -> Storage:
    """The disk, or with a reference to a secret (file:PATH or env:NAME) a storage that signs and, if asked, encrypts.

    Raises ConfigError or CheckpointError for a secret that is not there or too short.
    """
    return SecretStorage(Seal(read_secret(reference)), encrypt=encrypt) if reference else DISK


def read_secret(reference: str) -> bytes:
    """The secret that file:PATH or env:NAME refers to. It is never shown, and what is no reference is not either.

    Raises ConfigError when it is not there, or in a file that others may read.
    """
    kind, colon, name = reference.partition(":")
    if not colon or not name or kind not in ("file", "env"):
        fault = FieldError(
            "checkpoint.secret-no-reference",
            "secret",
            "...",
            "is neither file:PATH nor env:NAME",
            "Give where the secret is, not the secret.",
        )
        raise ConfigError([fault])
    if kind == "env":
        if (secret := secret_variable(name)) is None:
            fault = FieldError(
                "checkpoint.secret-not-set", "secret", reference, "is not set", "Set it to at least 32 characters."
            )
            raise ConfigError([fault])
        return secret
    try:
        if Path(name).stat().st_mode & 0o077:
            problem = "others than its owner may read it"
            raise ConfigError([FieldError("checkpoint.secret-open", "secret", reference, problem, f"chmod 600 {name}")])
        return Path(name).read_bytes()
    except OSError as error:
        problem = f"cannot be read: {error.strerror}"
        fault = FieldError(
            "checkpoint.secret-unreadable", "secret", reference, problem, "Give a file of at least 32 bytes."
        )
        raise ConfigError([fault]) from None


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
                "checkpoint.secret-too-short",
                f"the secret has {len(self.secret)} bytes, at least {MIN_SECRET_BYTES} are needed: make one with "
                f"`head -c 32 /dev/urandom > FILE` and `chmod 600 FILE`",
            )

    @cached_property
    def _sign_key(self) -> bytes:
        return hkdf(self.secret, b"", b"trident checkpoint digest v1")

    def sign(self, data: bytes | bytearray | memoryview = b"") -> Hasher:
        """HMAC-SHA256 of some bytes, and of those that its `update` takes in later."""
        return hmac.new(self._sign_key, data, hashlib.sha256)

    def new_cipher(self, file: Path, content_bytes: int) -> Cipher:
        """To seal a new file."""
        head = SEALED + secrets.token_bytes(SALT_BYTES) + content_bytes.to_bytes(8, "little")
        return self.cipher_of(file, head)

    def cipher_of(self, file: Path, head: bytes) -> Cipher:
        """To read a sealed file that begins with `head`."""
        salt = head[len(SEALED) : len(SEALED) + SALT_BYTES]
        key = hkdf(self.secret, salt, b"trident checkpoint file v1 " + file.name.encode())
        return Cipher(key, head, file)


@dataclass(frozen=True)
class Cipher:
    """One sealed file: its key and its first bytes."""

    key: bytes = field(repr=False)
    head: bytes
    file: Path

    @property
    def content_bytes(self) -> int:
        """Bytes of the content, as the head says."""
        return int.from_bytes(self.head[-8:], "little")

    @cached_property
    def _aes(self) -> Any:
        try:
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        except ImportError:
            text = "encrypted checkpoints need the package cryptography: pip install 'trident-engine[secure]'"
            raise CheckpointError("checkpoint.cryptography-missing", text) from None
        return AESGCM(self.key)

    def close_chunk(self, number: int, content: bytes | bytearray | memoryview) -> bytes:
        """Chunk `number`, sealed: its bytes of content and a tag."""
        return self._aes.encrypt(number.to_bytes(12, "little"), content, self.head)

    def open_chunk(self, number: int, raw: bytes | bytearray | memoryview) -> bytes:
        """The content of a sealed chunk. Raises WrongSecretError if it is not the one that was written."""
        aes = self._aes
        from cryptography.exceptions import InvalidTag

        try:
            return aes.decrypt(number.to_bytes(12, "little"), raw, self.head)
        except InvalidTag:
            raise WrongSecretError(
                "checkpoint.sealed-chunk-not-opened",
                f"{self.file}: bytes {number * CHUNK_BYTES} and on cannot be opened: the file was changed or damaged, "
                f"or the secret is another one",
            ) from None


class _SealedWriter:
    """Seals what is written, a chunk at a time; the last one when the file is synced."""

    def __init__(self, inner: Writer, cipher: Cipher):
        self._inner, self._cipher = inner, cipher
        self._number, self._pending = 0, bytearray()
        inner.write(memoryview(cipher.head))

    def write(self, data: memoryview) -> None:
        data = data.cast("B")
        while len(data):
            if not self._pending and len(data) >= CHUNK_BYTES:  # no copy of what is whole already
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
        self._inner.write(memoryview(self._cipher.close_chunk(self._number, chunk)))
        self._number += 1


class _SealedFile:
    """Opens ranges of a sealed file. size: of the content."""

    def __init__(self, inner: StoredFile, cipher: Cipher):
        self._inner, self._cipher, self.size = inner, cipher, cipher.content_bytes
        if inner.size != sealed_bytes(self.size):
            raise CheckpointError(
                "checkpoint.sealed-size-differs",
                f"{cipher.file}: has {inner.size} bytes, its head promises {sealed_bytes(self.size)}; it was cut, "
                "extended or damaged",
            )

    def read_into(self, offset: int, into: memoryview, seen: Callable[[memoryview], None] = unseen) -> None:
        into, filled = into.cast("B"), 0
        while filled < len(into):
            number, skip = divmod(offset + filled, CHUNK_BYTES)
            size = min(CHUNK_BYTES, self.size - number * CHUNK_BYTES)
            raw = bytearray(max(0, size) + TAG_BYTES)
            self._inner.read_into(HEAD_BYTES + number * (CHUNK_BYTES + TAG_BYTES), memoryview(raw))
            content = memoryview(self._cipher.open_chunk(number, raw))[skip : skip + len(into) - filled]
            into[filled : filled + len(content)] = content
            seen(into[filled : filled + len(content)])
            filled += len(content)

    def close(self) -> None:
        self._inner.close()


class SecretStorage:
    """A storage whose digests are signatures and, with `encrypt`, whose new files are sealed; it reads both kinds."""

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

    def open(self, path: Path, *, fresh: bool = False) -> StoredFile:
        source = self._inner.open(path, fresh=fresh)
        try:
            head = bytearray(min(source.size, HEAD_BYTES))
            source.read_into(0, memoryview(head))
            if not head.startswith(SEALED):
                return source
            return _SealedFile(source, self._seal.cipher_of(path, bytes(head)))
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
