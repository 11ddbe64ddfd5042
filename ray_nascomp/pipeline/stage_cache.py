"""Finished stages on disk, so that trials whose plans begin alike share the work of their beginning.

An entry is one safetensors file whose header holds facts as JSON and a checksum. It is written
under another name and renamed, so that readers see whole entries only; one that is damaged all
the same is removed and computed again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow.fs
from torch import Tensor

from ray_nascomp.errors import ConfigError

logger = logging.getLogger(__name__)

DEFAULT_BYTES = 10_000_000_000
_ENTRY, _MARK, _PARTIAL = ".stage", ".stage-used", ".stage-partial"
_STALE_SECONDS = 3600.0
"""Age from which an unfinished file is one that its writer has left behind."""
_KEPT_SHARE, _CHECKED_SHARE = 0.9, 0.05
"""What is left after an eviction, and after how much writing a process looks at the size again, of `max_bytes`."""


@dataclass(frozen=True)
class Entry:
    """What is kept of a stage.

    Attributes:
        tensors: Tensors by name.
        facts: Plain values.
    """

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


class StageCache:
    """A folder of finished stages, on this machine or on storage that several share.

    Many processes may read and write it at once. What was used longest ago goes once the entries
    are larger than allowed; as every process looks at the size after it has written a twentieth
    of it, there may be so much more for a moment.

    Args:
        location: A folder, or a URI that pyarrow's file systems know, such as "s3://bucket/cache".
        max_bytes: How large all entries together may be, above 0; 10 GB unless told.

    Raises:
        ConfigError: If an argument is not allowed.
    """

    def __init__(self, location: str | Path, max_bytes: int = DEFAULT_BYTES) -> None:
        if not isinstance(location, (str, Path)) or not str(location):
            raise ConfigError(f"cache: {location!r} was given; a folder that can be written, or its URI, is allowed")
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes <= 0:
            raise ConfigError(f"max_bytes: {max_bytes!r} was given, a positive whole number is allowed")
        text = str(location)
        try:
            found: tuple[Any, str] = pyarrow.fs.LocalFileSystem(), str(Path(text).expanduser().resolve())
            if "://" in text:
                found = pyarrow.fs.FileSystem.from_uri(text)
            self.filesystem, self.path = found
            self.filesystem.create_dir(self.path, recursive=True)
        except (OSError, ValueError) as error:
            raise ConfigError(f"cache: {text!r} was given; a folder that can be written is allowed: {error}") from error
        self.max_bytes = max_bytes
        self._written: float | None = None

    def read(self, key: str) -> Entry | None:
        """The entry of a key; None where there is none, or a damaged one, which is removed."""
        path = self._file(key, _ENTRY)
        try:
            with self.filesystem.open_input_stream(path) as stream:
                content = stream.read()
        except OSError:
            return None
        try:
            entry = _unpack(content)
        except Exception as error:  # Whatever damage makes of its reader.
            logger.warning("%s is damaged and is made again: %s", path, error)
            self._delete(path)
            return None
        self._mark(key)
        return entry

    def write(self, key: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Keeps an entry; what cannot be written is left out, with a warning.

        Args:
            key: Letters and digits.
            tensors: Tensors by name, on the CPU, contiguous, none sharing memory with another.
            facts: Plain values that JSON can hold.
        """
        content = _pack(tensors, facts)
        if len(content) > self.max_bytes:
            return
        partial = self._file(f"{key}-{uuid.uuid4().hex}", _PARTIAL)
        try:
            with self.filesystem.open_output_stream(partial) as stream:
                stream.write(content)
            self.filesystem.move(partial, self._file(key, _ENTRY))
            if self._written is not None:
                self._written += len(content)
            if self._written is None or self._written > _CHECKED_SHARE * self.max_bytes:
                self._evict()
        except OSError as error:
            logger.warning("a stage could not be kept in %s: %s", self.path, error)

    @property
    def size(self) -> int:
        """Bytes of all entries."""
        return sum(info.size for info in self._files() if info.path.endswith(_ENTRY))

    def _evict(self) -> None:
        self._written = 0.0
        entries: dict[str, int] = {}
        used: dict[str, int] = {}
        for info in self._files():
            name = PurePosixPath(info.path)
            if name.suffix == _PARTIAL:
                if time.time() - (info.mtime_ns or 0) / 1e9 > _STALE_SECONDS:
                    self._delete(info.path)
                continue
            used[name.stem] = max(used.get(name.stem, 0), info.mtime_ns or 0)
            if name.suffix == _ENTRY:
                entries[name.stem] = info.size
        total = sum(entries.values())
        if total <= self.max_bytes:
            return
        for key in sorted(entries, key=lambda key: used[key]):
            if total <= _KEPT_SHARE * self.max_bytes:
                return
            self._delete(self._file(key, _ENTRY))
            self._delete(self._file(key, _MARK))
            total -= entries[key]

    def _files(self) -> list[pyarrow.fs.FileInfo]:
        found = self.filesystem.get_file_info(pyarrow.fs.FileSelector(self.path, allow_not_found=True))
        return [info for info in found if info.type is pyarrow.fs.FileType.File]

    def _mark(self, key: str) -> None:
        """Notes that an entry is in use: object stores cannot touch a file, so another one is written."""
        try:
            with self.filesystem.open_output_stream(self._file(key, _MARK)):
                pass
        except OSError as error:
            logger.debug("%s cannot be marked as used: %s", key, error)

    def _delete(self, path: str) -> None:
        try:
            self.filesystem.delete_file(path)
        except OSError:
            logger.debug("%s is gone already", path)

    def _file(self, key: str, suffix: str) -> str:
        return f"{self.path}/{key}{suffix}"


def _pack(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> bytes:
    from safetensors.torch import save

    text = json.dumps(facts)
    content: bytes = save(dict(tensors), metadata={"facts": text, "sha256": _checksum(tensors, text)})
    return content


def _unpack(content: bytes) -> Entry:
    from safetensors.torch import load

    tensors = load(content)
    length = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + length])["__metadata__"]
    if metadata["sha256"] != _checksum(tensors, metadata["facts"]):
        raise ValueError("its checksum is wrong")
    return Entry(tensors, json.loads(metadata["facts"]))


def _checksum(tensors: Mapping[str, Tensor], text: str) -> str:
    import torch

    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()
