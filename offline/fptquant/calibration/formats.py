"""What a file is, text or rows of a dataset: by its content first, and by its name where the content can't tell."""

from __future__ import annotations

import codecs
import io
import json
import re
from importlib import import_module
from pathlib import Path
from typing import IO

from fptquant.errors import FPTQuantError, is_out_of_memory

AS_TEXT = "text:"  # in front of a source: JSON, CSV and TSV are taken as the text that they are

_HEAD = 4096  # bytes
_SUFFIXES = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
# How compressed files start, and the module whose `open` reads them.
_DECOMPRESSORS = (
    (re.compile(rb"\x1f\x8b\x08"), "gzip"),
    (re.compile(rb"BZh[1-9]1AY&SY"), "bz2"),
    (re.compile(rb"\xfd7zXZ\0"), "lzma"),
    (re.compile(rb"\x28\xb5\x2f\xfd"), "zstandard"),
)
# Arrow's stream has no name in front, only the mark of its first message.
_BINARY_ROWS = ((b"PAR1", "parquet"), (b"ARROW1", "arrow"), (b"\xff\xff\xff\xff", "arrow"))
_NO_TEXT = (
    (re.compile(re.escape(codecs.BOM_UTF16_LE) + b"|" + re.escape(codecs.BOM_UTF16_BE)),
     "UTF-16 or UTF-32: convert it to UTF-8 (iconv -t UTF-8)"),
    (re.compile(rb"PK\x03\x04|7z\xbc\xaf|.{257}ustar", re.DOTALL), "an archive: unpack it first"),
    (re.compile(rb"%PDF-"), "a PDF: extract its text first"),
    (re.compile(rb".{7}\0\{", re.DOTALL), "a safetensors file: it holds tensors, no text"),
    (re.compile(rb".*\0", re.DOTALL), "binary (it holds NUL bytes): give UTF-8 text"),
)  # fmt: skip
_JSON_OBJECTS = re.compile(r"""\s*(\[\s*)?\{\s*["']""")


def recognise(path: Path) -> str:
    """What a file holds, compressed or not.

    Returns:
        'text', or the rows of a dataset: 'json', 'csv', 'tsv', 'parquet' or 'arrow'.

    Raises:
        FPTQuantError: unreadable, or neither text nor rows.
    """
    head = _read(path, _HEAD)
    if not head:
        raise FPTQuantError(f"'{path}' is empty: give a longer text")
    suffix, packed = _suffix(path), _decompressor(path) is not None
    for magic, kind in _BINARY_ROWS:
        if head.startswith(magic):
            if packed:
                raise FPTQuantError(f"'{path}' is {kind} within a compressed file: decompress it first")
            return kind
    for pattern, what in _NO_TEXT:
        if pattern.match(head):
            raise FPTQuantError(f"'{path}' is {what}")
    kind = _SUFFIXES.get(suffix, "text")
    if kind in ("parquet", "arrow"):
        raise FPTQuantError(f"'{path}' is named {suffix}, but isn't {kind}: fetch it again, or give it its right name")
    start = head.decode("utf-8-sig", errors="replace")
    undecided = start.lstrip().startswith("[") and not _JSON_OBJECTS.match(start)
    if looks_like_json(_read(path).decode("utf-8-sig", errors="replace") if undecided else start):
        return "json"
    return kind


def looks_like_json(text: str) -> bool:
    """Whether a text starts like an object of JSON or Python, or is nothing but JSON arrays."""
    if _JSON_OBJECTS.match(text):
        return True
    decoder, at = json.JSONDecoder(), len(text) - len(text.lstrip())
    while text.startswith("[", at):  # footnotes and wiki links start like this too, but don't go on like it
        try:
            _, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return False
        while text[at : at + 1].isspace():
            at += 1
    return 0 < at == len(text)


def require_text(source: str | Path) -> Path:
    """The file that a source names, with or without `text:` in front, of which only the start is read.

    Raises:
        FPTQuantError: unreadable, or no text.
    """
    path = Path(str(source).removeprefix(AS_TEXT))
    kind = recognise(path)
    if kind != "text" and not str(source).startswith(AS_TEXT):
        raise FPTQuantError(f"'{path}' is {kind}, not text: {as_text_hint(str(path))}")
    return path


def is_named_like_a_file(path: Path) -> bool:
    """Whether a name ends as that of a text, of rows, or of a compressed file."""
    return _suffix(path) in (".txt", *_SUFFIXES) or path.suffix.lower() in _COMPRESSED


def read_text(source: str | Path) -> str:
    """The content of a UTF-8 text file, which may be compressed.

    Args:
        source: the file, with `text:` in front where it may be JSON, CSV or TSV.

    Raises:
        FPTQuantError: unreadable, or no text.
    """
    path = require_text(source)
    content = _read(path)
    if b"\0" in content:
        raise FPTQuantError(f"'{path}' is binary (it holds NUL bytes): give UTF-8 text")
    try:
        return io.TextIOWrapper(io.BytesIO(content), encoding="utf-8").read()
    except UnicodeDecodeError as error:
        raise FPTQuantError(f"'{path}' is not UTF-8 text: {error.reason}") from None


def as_text_hint(source: str) -> str:
    """How to have JSON and the like taken as text, for the end of an error."""
    return f"'{AS_TEXT}{source}' takes it as text, syntax included"


def _suffix(path: Path) -> str:
    """The suffix in lower case, that of the compression left out."""
    name = Path(path.name.lower())
    return Path(name.stem).suffix if name.suffix in _COMPRESSED else name.suffix


def _decompressor(path: Path) -> str | None:
    with path.open("rb") as file:
        head = file.read(16)
    return next((module for magic, module in _DECOMPRESSORS if magic.match(head)), None)


def _read(path: Path, size: int = -1) -> bytes:
    """The first `size` bytes (or all) of a file, decompressed."""
    try:
        module = _decompressor(path)
        opened: IO[bytes] = import_module(module).open(path, "rb") if module else path.open("rb")
        with opened as file:
            return file.read(size)
    except ImportError:
        raise FPTQuantError(f"'{path}' is compressed with zstd: pip install zstandard, or decompress it") from None
    except Exception as error:  # every decompressor has kinds of its own
        if is_out_of_memory(error):
            raise
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise FPTQuantError(f"text file '{path}' can't be read: {reason}") from None
