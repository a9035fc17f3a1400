import bz2
import gzip
import importlib.util
import json
import lzma
import tracemalloc

import pytest

from gcompute.train import text_file
from gcompute.train.text_file import NotText, read_python, read_text

TEXT = "naïve café, 日本 🙂\r\nsecond line\n" * 40
MARK = b"\xef\xbb\xbf"
PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def written(tmp_path, content, name="a.txt"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def jsonl(*texts):
    return "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts)


@pytest.mark.parametrize("chunk_bytes", [1, 2, 3, 7, 1 << 20])
def test_text_is_the_same_however_it_is_cut(tmp_path, monkeypatch, chunk_bytes):
    monkeypatch.setattr(text_file, "CHUNK_BYTES", chunk_bytes)
    assert "".join(read_text(written(tmp_path, MARK + TEXT.encode()))) == TEXT
    records = jsonl("one", "", "zwei\n日本", "\ud800!")
    pieces = list(read_text(written(tmp_path, MARK + records.encode(), "a.jsonl")))
    assert pieces == ["one", None, "zwei\n日本", None, "\ufffd!", None]


def test_only_the_first_mark_is_dropped(tmp_path):
    assert "".join(read_text(written(tmp_path, MARK + "a\ufeffb".encode()))) == "a\ufeffb"
    assert list(read_text(written(tmp_path, MARK))) == []


@pytest.mark.parametrize("suffix", PACK)
def test_compressed_text_is_read_whatever_its_name(tmp_path, suffix):
    packed = PACK[suffix](MARK + TEXT.encode())
    for name in (f"a.txt{suffix}", "a.txt"):
        assert "".join(read_text(written(tmp_path, packed, name))) == TEXT
    records = PACK[suffix](jsonl("one", "two").encode())
    assert list(read_text(written(tmp_path, records, f"a.jsonl{suffix}"))) == ["one", None, "two", None]


@pytest.mark.parametrize("suffix", PACK)
def test_a_damaged_file_is_told_from_a_whole_one(tmp_path, suffix):
    packed = PACK[suffix](TEXT.encode())
    with pytest.raises(NotText, match=r"a.txt' is damaged (gzip|bzip2|xz) data: .* Give a whole file") as caught:
        list(read_text(written(tmp_path, packed[:-9])))
    assert caught.value.reason.startswith("damaged ")


def test_zstandard_needs_a_package_or_a_newer_python(tmp_path):
    path = written(tmp_path, b"\x28\xb5\x2f\xfd" + b"damaged", "a.zst")
    there = importlib.util.find_spec("zstandard") or importlib.util.find_spec("compression")
    with pytest.raises(NotText, match="damaged Zstandard" if there else "Install the package zstandard"):
        list(read_text(path))


@pytest.mark.parametrize("chunk_bytes", [7, 1 << 20])
def test_the_package_zstandard_reads_frames_and_notices_their_end(tmp_path, monkeypatch, chunk_bytes):
    zstandard = pytest.importorskip("zstandard")
    monkeypatch.setattr(text_file, "CHUNK_BYTES", chunk_bytes)
    packed = zstandard.ZstdCompressor().compress(TEXT.encode())
    assert "".join(read_text(written(tmp_path, packed * 2))) == TEXT * 2
    for size in (20, len(packed) - 1, len(packed) + 10):
        with pytest.raises(NotText, match=r"damaged Zstandard data"):
            list(read_text(written(tmp_path, (packed * 2)[:size])))


@pytest.mark.parametrize(
    ("content", "message", "reason"),
    [
        (b"text\0more", "byte 0x00 at offset 4", "binary"),
        (b"\xff\0", "byte 0xFF at offset 0", "binary"),
        ("ab\n".encode("utf-16"), "byte 0xFF at offset 0", "not UTF-8"),
        ("café".encode("latin-1"), "byte 0xE9 at offset 3", "not UTF-8"),
        ("日本".encode()[:-1], "byte 0xE6 at offset 3", "not UTF-8"),
        (MARK + b"ab\xff", "byte 0xFF at offset 5", "not UTF-8"),
        (gzip.compress(b"\0", mtime=0), "byte 0x00 at offset 0", "binary"),
    ],
)
@pytest.mark.parametrize("chunk_bytes", [1, 2, 1 << 20])
def test_what_is_no_utf_8_is_told_by_its_first_bad_byte(tmp_path, monkeypatch, content, message, reason, chunk_bytes):
    monkeypatch.setattr(text_file, "CHUNK_BYTES", chunk_bytes)
    with pytest.raises(NotText, match=message) as caught:
        list(read_text(written(tmp_path, content)))
    if chunk_bytes > 2:
        assert caught.value.reason == reason


@pytest.mark.parametrize("line", ['{"body": "x"}', '{"text": 3}', "[1]", "plain", "[" * 100_000], ids=range(5))
def test_a_record_without_text_is_named(tmp_path, line):
    path = written(tmp_path, jsonl("one") + "\n" + line + "\n")
    with pytest.raises(NotText, match=r"'called.jsonl', line 3, is no JSON object with text in its field \"text\""):
        list(read_text(path, name="called.jsonl"))


def test_a_line_without_end_is_no_record(tmp_path, monkeypatch):
    monkeypatch.setattr(text_file, "LONGEST_RECORD_CHARACTERS", 100)
    monkeypatch.setattr(text_file, "CHUNK_BYTES", 10)
    with pytest.raises(NotText, match="a line of more than 100 characters"):
        list(read_text(written(tmp_path, '{"text": "' + "x" * 1000, "a.jsonl")))


def test_what_a_small_file_unpacks_to_is_never_whole_in_memory(tmp_path):
    path = written(tmp_path, gzip.compress(b"a" * 64_000_000), "bomb.gz")
    assert path.stat().st_size < 100_000
    tracemalloc.start()
    try:
        assert sum(map(len, read_text(path))) == 64_000_000
        assert tracemalloc.get_traced_memory()[1] < 8e6
    finally:
        tracemalloc.stop()


def test_python_is_read_as_it_declares(tmp_path):
    source = "# -*- coding: latin-1 -*-\r\nname = 'é'\r\n"
    assert "".join(read_python(written(tmp_path, source.encode("latin-1")))) == source.replace("\r\n", "\n")
    with pytest.raises(NotText, match="encoding that it declares"):
        list(read_python(written(tmp_path, "name = 'é'".encode("latin-1"))))
