"""Encrypted files decrypt to the same bytes in any range with the right secret, and otherwise not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.checkpoint import seal as module
from engine.checkpoint.format import find_checkpoint, find_damage, newest_step, read_manifest
from engine.checkpoint.load import Reader
from engine.checkpoint.save import save
from engine.checkpoint.seal import HEAD_BYTES, Seal, SecretStorage, hkdf, open_storage, read_secret, sealed_bytes
from engine.checkpoint.storage import DISK, read_file, write_file
from engine.distributed.context import ParallelContext
from engine.errors import CheckpointError, ConfigError, SecretError, WrongSecretError
from engine.train.resume import manifest_fields, resume, start_from
from engine.train.state import setup
from engine.train.step import train_step
from engine.util.files import SEALED
from tests.support.cases import config, layout_of, random_batches
from tests.support.disk_double import MemoryDisk
from tests.support.errors import raises
from tests.support.harness import run_ranks

SECRET, OTHER = bytes(range(32)), bytes(range(1, 33))
FILE = Path("/rank.safetensors")
METADATA: dict[str, Any] = {"prefix": "x", "num_documents": 1, "num_tokens": 1, "tokenizer_digest": None}


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(module, "CHUNK_BYTES", 16)
    yield


def sealed(content: bytes, cut: int = 5) -> tuple[MemoryDisk, bytes]:
    """(memory disk with an encrypted file that was written in pieces, the raw bytes of that file)."""
    disk = MemoryDisk()
    writer = SecretStorage(Seal(SECRET), disk, encrypt=True).create(FILE, len(content))
    for begin in range(0, len(content), cut):
        writer.write(memoryview(content[begin : begin + cut]))
    writer.sync()
    writer.close()
    return disk, read_file(disk, FILE)


def opened(disk: MemoryDisk, begin: int, end: int, secret: bytes = SECRET, file: Path = FILE) -> bytes:
    source = SecretStorage(Seal(secret), disk).open(file)
    out, seen = bytearray(end - begin), bytearray()
    source.read_into(begin, memoryview(out), seen.extend)
    assert seen == out, "the digested bytes differ from the bytes read"
    return bytes(out)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=100), st.integers(1, 60), st.data())
def test_any_range_opens_to_the_content(content: bytes, cut: int, data: st.DataObject) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK_BYTES", 16)
        disk, raw = sealed(content, cut)
        assert len(raw) == sealed_bytes(len(content))
        begin = data.draw(st.integers(0, len(content)))
        end = data.draw(st.integers(begin, len(content)))
        assert opened(disk, begin, end) == content[begin:end]
        assert len(content) < 8 or content[:8] not in raw[HEAD_BYTES:]
        status = SecretStorage(Seal(SECRET), disk).stat(FILE)
        assert status is not None and status.size == len(content)


def test_every_change_of_every_byte_is_found(small_chunks: None) -> None:
    disk, raw = sealed(bytes(40))
    for place in range(len(raw)):
        write_file(disk, FILE, raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
        if place < len(SEALED):  # it then looks like a plain file, whose digests differ from the manifest
            assert opened(disk, 0, 40) != bytes(40)
            continue
        size = HEAD_BYTES - 8 <= place < HEAD_BYTES
        with raises(CheckpointError, f"checkpoint.sealed-{'size-differs' if size else 'chunk-not-opened'}", FILE):
            opened(disk, 0, 40)


def test_another_secret_name_order_or_length_is_rejected(small_chunks: None) -> None:
    disk, raw = sealed(bytes(64))
    with raises(WrongSecretError, "checkpoint.sealed-chunk-not-opened", FILE, 0):
        opened(disk, 0, 64, secret=OTHER)
    write_file(disk, Path("/other"), raw)
    with raises(WrongSecretError, "checkpoint.sealed-chunk-not-opened", "/other", 0):
        opened(disk, 0, 64, file=Path("/other"))
    head, chunk = raw[:HEAD_BYTES], 32
    first, second = raw[HEAD_BYTES : HEAD_BYTES + chunk], raw[HEAD_BYTES + chunk : HEAD_BYTES + 2 * chunk]
    write_file(disk, FILE, head + second + first + raw[HEAD_BYTES + 2 * chunk :])
    with raises(WrongSecretError, "checkpoint.sealed-chunk-not-opened", FILE, 0):
        opened(disk, 0, 64)
    write_file(disk, FILE, raw[:-1])
    with raises(CheckpointError, "checkpoint.sealed-size-differs", FILE, 175, 176):
        opened(disk, 0, 64)


def test_no_two_files_are_equal_and_no_secret_is_shown() -> None:
    assert sealed(bytes(64))[1] != sealed(bytes(64))[1]
    seal = Seal(SECRET)
    assert SECRET.hex() not in repr(seal) and repr(SECRET) not in repr(seal)
    assert "key" not in repr(seal.new_cipher(FILE, 1))
    with raises(CheckpointError, "checkpoint.secret-too-short", 31, 32):
        Seal(bytes(31))


def test_hkdf_is_that_of_rfc_5869() -> None:
    key = hkdf(b"\x0b" * 22, bytes(range(13)), bytes(range(0xF0, 0xFA)))
    assert key.hex() == "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf"


def test_a_secret_comes_from_a_private_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "key"
    file.write_bytes(SECRET)
    file.chmod(0o600)
    assert read_secret(f"file:{file}") == SECRET
    file.chmod(0o640)
    with raises(ConfigError, "checkpoint.secret-open", file):
        read_secret(f"file:{file}")
    with raises(ConfigError, "checkpoint.secret-unreadable", f"{tmp_path}/none"):
        read_secret(f"file:{tmp_path}/none")
    monkeypatch.setenv("MY_SECRET", "x" * 40)
    assert read_secret("env:MY_SECRET") == b"x" * 40
    with raises(ConfigError, "checkpoint.secret-not-set", "env:NO_SUCH_SECRET"):
        read_secret("env:NO_SUCH_SECRET")
    with raises(ConfigError, "checkpoint.secret-no-reference") as error:
        read_secret("hunter2-is-my-secret-itself")
    assert "hunter2" not in str(error.value)
    assert open_storage("") is DISK


def save_in(root: Path, storage: Any, steps: int = 1) -> None:
    """Train `steps` steps on two ranks and save each."""
    cfg = config(2, parallel_tensor=2)

    def job(ctx: ParallelContext) -> None:
        state = setup(cfg, ctx)
        for step in range(steps):
            train_step(state, random_batches(cfg, ctx, step))
            save(root, state.optimizer.states(owned=True), ctx, step=step + 1, storage=storage,
                 metadata=manifest_fields(state, METADATA))  # fmt: skip

    run_ranks(layout_of(cfg), job)


def resumed(folder: Path, storage: Any) -> int:
    cfg = config(1)

    def job(ctx: ParallelContext) -> int:
        state = setup(cfg, ctx)
        resume(state, folder, METADATA, storage)
        return state.step

    return run_ranks(layout_of(cfg), job)[0]


@pytest.mark.parametrize("encrypt", [False, True], ids=["signed", "encrypted"])
def test_a_checkpoint_needs_its_secret_and_shows_every_change(tmp_path: Path, encrypt: bool) -> None:
    storage = SecretStorage(Seal(SECRET), encrypt=encrypt)
    save_in(tmp_path, storage, steps=2)
    folder = find_checkpoint(tmp_path, storage)
    assert folder.name == "step_00000002" and resumed(folder, storage) == 2
    assert list(find_damage(folder, read_manifest(folder, storage), storage)) == []
    text = b"".join(path.read_bytes() for path in folder.iterdir())
    assert (b"embed.weight" in text) is not encrypt and SECRET not in text and SECRET.hex().encode() not in text

    with raises(SecretError, "checkpoint.secret-needed", "encrypted" if encrypt else "signed", "--checkpoint.secret"):
        find_checkpoint(tmp_path)
    code = "sealed-chunk-not-opened" if encrypt else "wrong-secret"
    with raises(WrongSecretError, f"checkpoint.{code}"), pytest.warns(UserWarning):
        newest_step(tmp_path, SecretStorage(Seal(OTHER)))  # not None: a run must not start from step 0 here

    file = folder / "rank00001.safetensors"
    whole = file.read_bytes()
    for place in (9, 50, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert any("rank00001" in text for text in find_damage(folder, read_manifest(folder, storage), storage))
    shutil.copy(tmp_path / "step_00000001/rank00001.safetensors", file)  # a valid file of another step
    found = list(find_damage(folder, read_manifest(folder, storage), storage))
    assert found and all("rank00001" in text and "digest" in text for text in found)
    manifest = folder / "manifest.json"
    manifest.write_bytes((tmp_path / "step_00000001/manifest.json").read_bytes())
    with raises(CheckpointError, "checkpoint.folder-of-another-step", 1, "step_00000002"):
        read_manifest(folder, storage)


def test_an_edited_signed_manifest_is_rejected(tmp_path: Path) -> None:
    storage = SecretStorage(Seal(SECRET))
    save_in(tmp_path, storage)
    manifest = tmp_path / "step_00000001/manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"consumed_samples": 4', b'"consumed_samples": 8'))
    with raises(WrongSecretError, "checkpoint.wrong-secret", manifest):
        read_manifest(manifest.parent, storage)


def test_a_plain_checkpoint_is_rejected_where_a_secret_is_given(tmp_path: Path) -> None:
    save_in(tmp_path, DISK)
    with raises(SecretError, "checkpoint.not-signed", "--checkpoint.init"):
        newest_step(tmp_path, SecretStorage(Seal(SECRET)))


def test_both_kinds_are_read_whichever_is_written_now(tmp_path: Path) -> None:
    save_in(tmp_path, SecretStorage(Seal(SECRET)))
    with Reader(tmp_path / "step_00000001", SecretStorage(Seal(SECRET), encrypt=True)) as reader:
        signed = reader.read_whole("model", "norm.weight")
    save_in(tmp_path / "b", SecretStorage(Seal(SECRET), encrypt=True))
    with Reader(tmp_path / "b/step_00000001", SecretStorage(Seal(SECRET))) as reader:
        assert reader.read_whole("model", "norm.weight").equal(signed)


def test_a_run_starts_from_a_signed_one_and_is_told_what_to_do_with_an_encrypted_one(tmp_path: Path) -> None:
    for name, encrypt in (("signed", False), ("encrypted", True)):
        save_in(tmp_path / name / "checkpoints", SecretStorage(Seal(SECRET), encrypt=encrypt))
    key = tmp_path / "key"
    key.write_bytes(SECRET)
    key.chmod(0o600)
    cfg = config(checkpoint_init=tmp_path / "signed", checkpoint_secret=f"file:{key}")

    def job(ctx: ParallelContext) -> str:
        state = setup(cfg, ctx)
        folder, _ = start_from(state, Path(cfg.checkpoint.init))
        return f"{folder.name} {state.lineage[0].step}"

    assert run_ranks(layout_of(cfg), job) == ["step_00000001 1"]
    with raises(ConfigError, "config.init-not-readable", "checkpoint.init", tmp_path / "encrypted", "engine export"):
        config(checkpoint_init=tmp_path / "encrypted", checkpoint_secret=f"file:{key}")
