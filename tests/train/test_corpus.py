import gc
import gzip
import json
import lzma
import os
import subprocess
import sys
import tempfile
import threading
import tracemalloc
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from gcompute.config.train import DataConfig
from gcompute.model.tokenizer import Tokenizer
from gcompute.train import corpus
from gcompute.train.corpus import pieces, prepare
from gcompute.train.data import BatchSource, ValidationWindows
from gcompute.train.identity import tokens_fingerprint
from gcompute.train.source import find_source, limited, split_documents, stdlib_source

PROSE = "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n" * 30


def write(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(root)


def split(data, val_fraction=0.1):
    return split_documents(find_source(str(data)), val_fraction, lambda stage, done, total: None)


def names(documents):
    return {document.name for document in documents}


@pytest.fixture
def prose(tmp_path):
    return write(tmp_path, {"prose.txt": PROSE}) + "/prose.txt"


def small_stdlib(root):
    """A few files of the shape of a standard library, with what must not get in."""
    library = {f"module_{index}.py": f"def function_{index}():\n    return {index}\n" for index in range(40)}
    return Path(
        write(
            root,
            {
                **library,
                "package/inner.py": "# -*- coding: latin-1 -*-\nname = '\xe9'\n".encode("latin-1"),
                "package/wrong.py": "# -*- coding: utf-8 -*-\nname = '\xe9'\n".encode("latin-1"),
                "package/unknown.py": "# -*- coding: no-such -*-\n",
                "site-packages/installed.py": "secret = 1\n",
                "dist-packages/installed.py": "secret = 1\n",
                "package/__pycache__/inner.py": "secret = 1\n",
                "README.txt": "secret\n",
            },
        )
    )


# --- sources and splits


def test_one_file_is_cut_as_nanogpt_cuts_it(prose):
    documents = split(prose)
    whole = "".join(document.text() for document in documents.train + documents.val)
    assert whole == PROSE
    assert documents.train[0].text() == PROSE[: int(len(PROSE) * 0.9)]
    assert not documents.separated


def test_the_cut_counts_characters_not_bytes_and_keeps_line_ends(tmp_path):
    text = "é\r\n" * 100
    documents = split(write(tmp_path, {"text.txt": text}) + "/text.txt")
    assert documents.train[0].text() == text[:270]
    assert documents.val[0].text() == text[270:]


def test_a_directory_is_dealt_by_file_and_binary_files_are_counted(tmp_path):
    files = {f"{index // 10}/{index}.txt": f"text {index}\n" for index in range(200)}
    other = {"a.bin": b"\0\1", "b.bin": b"\xff\xfe", "empty.txt": "", ".hidden": "x", ".git/config": "x"}
    documents = split(write(tmp_path, {**files, **other}))
    assert len(documents.skipped) == 2
    assert documents.separated
    assert not names(documents.train) & names(documents.val)
    assert names(documents.train) | names(documents.val) == set(files)
    assert 5 <= len(documents.val) <= 40  # 20 expected; the names are fixed
    assert {document.name: document.text() for document in documents.train + documents.val} == files


def test_adding_a_file_moves_no_other(tmp_path):
    write(tmp_path, {f"{index}.txt": "text" for index in range(100)})
    before = split(tmp_path)
    write(tmp_path, {"another.txt": "text"})
    after = split(tmp_path)
    assert names(before.train) <= names(after.train)
    assert names(before.val) <= names(after.val)


@pytest.mark.parametrize("val_fraction", [0.001, 0.5, 0.999])
def test_two_files_leave_neither_split_empty(tmp_path, val_fraction):
    documents = split(write(tmp_path, {"a.txt": "aa", "b.txt": "bb"}), val_fraction)
    assert (len(documents.train), len(documents.val)) == (1, 1)


def test_a_directory_with_one_text_is_cut_as_a_file(tmp_path):
    documents = split(write(tmp_path, {"a.txt": PROSE, "b.bin": b"\0"}))
    assert documents.train[0].text() == PROSE[: int(len(PROSE) * 0.9)]
    assert (documents.separated, len(documents.skipped)) == (False, 1)


@pytest.mark.oldest
def test_a_standard_library_is_its_own_python_source(tmp_path):
    documents = split_documents(stdlib_source(small_stdlib(tmp_path)), 0.1, lambda *_: None)
    texts = {document.name: document.text() for document in documents.train + documents.val}
    assert set(texts) == {*(f"module_{index}.py" for index in range(40)), "package/inner.py"}
    assert "é" in texts["package/inner.py"]
    assert len(documents.skipped) == 2
    assert [document.name for document in documents.train] == sorted(names(documents.train))


def test_the_running_interpreter_has_tens_of_megabytes():
    source = find_source("stdlib")
    assert sum(path.stat().st_size for path in source.paths.values()) > 8e6
    assert {"os.py", "json/decoder.py"} <= set(source.paths)
    assert not any("site-packages" in name for name in source.paths)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, r"nothing\.txt' cannot be read: No such file.*Legal: stdlib"),
        ({"nothing.txt": ""}, "is empty"),
        ({"nothing.txt": b"text\0more"}, "byte 0x00 at offset 4"),
        ({"nothing.txt": "café".encode("latin-1")}, "byte 0xE9 at offset 3"),
        ({"nothing.txt": b"\xff\0"}, "byte 0xFF at offset 0"),
        ({"nothing.txt": "ab"}, "train split has 1 tokens, and needs at least 2"),
        ({"nothing.txt": "a"}, "train split has 0 tokens, and needs at least 2"),
        ({"nothing.txt": "abcde"}, "val split has 1 tokens, and needs at least 2"),
        ({"nothing.txt/a.bin": b"\0"}, r"holds no text: 1 binary \(a.bin\)"),
        ({"nothing.txt/a.txt": ""}, "is empty"),
        ({"nothing.txt/.hidden": "x"}, "holds no files"),
    ],
)
def test_bad_data_is_one_line_and_leaves_nothing(tmp_path, content, message):
    write(tmp_path, content)
    with pytest.raises(ValueError, match=message) as caught:
        prepare(DataConfig(data=str(tmp_path / "nothing.txt"), tokenizer="byte"), tmp_path / "tokens")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "tokens").exists() or not list((tmp_path / "tokens").iterdir())


@pytest.mark.oldest("bpe:300")
@pytest.mark.parametrize("tokenizer", ["bpe:300", "char", "byte"])
def test_nearly_empty_text_is_too_short_for_every_tokenizer(tmp_path, tokenizer):
    write(tmp_path, {"a.txt": "a"})
    with pytest.raises(ValueError, match="too short"):
        prepare(DataConfig(data=str(tmp_path / "a.txt"), tokenizer=tokenizer), tmp_path / "tokens")


@pytest.mark.oldest
def test_a_misspelt_stdlib_is_recognised():
    with pytest.raises(ValueError, match="Did you mean 'stdlib'"):
        find_source("stdlb")


def test_a_python_without_sources_says_so(tmp_path):
    with pytest.raises(ValueError, match="no source text"):
        stdlib_source(tmp_path)


def test_latin_1_and_archives_are_left_out_with_a_word_and_compressed_text_is_read(tmp_path):
    latin = {f"{index}.txt": "café déjà vu".encode("latin-1") for index in range(5)}
    other = {"a.txt": PROSE, "b.txt.gz": gzip.compress(PROSE.encode()), "c.tar.xz": lzma.compress(b"c\0\0")}
    documents = split(write(tmp_path, {**latin, **other}))
    assert names(documents.train) | names(documents.val) == {"a.txt", "b.txt.gz"}
    said = "6 of 8 files left out: 5 not UTF-8 (0.txt, 1.txt, 2.txt, ...), 1 binary (c.tar.xz)"
    assert documents.left_out == said
    data = DataConfig(data=str(tmp_path), tokenizer="byte")
    for reused in (False, True):
        made = prepare(data, tmp_path.with_name("tokens"), progress=None)
        assert (made.reused, made.left_out) == (reused, said)


def test_a_folder_of_links_alone_is_read(tmp_path):
    write(tmp_path / "real", {"a.txt": PROSE})
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link").symlink_to(tmp_path / "real")
    assert names(split(tmp_path / "data").train) == {"link/a.txt"}


def records(*texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def test_jsonl_is_cut_between_records_each_with_its_end(tmp_path):
    texts = [f"record {index} é\n" * (1 + index % 3) for index in range(40)]
    data = write(tmp_path, {"a.jsonl": records(*texts)}) + "/a.jsonl"
    made = prepare(DataConfig(data=data, tokenizer="byte", val_fraction=0.3), tmp_path / "tokens")
    end = made.tokenizer.end_of_text
    cut, decode = 0, made.tokenizer.decode
    for tokens in (made.train, made.val):
        ids = tokens.tolist()
        assert ids[-1] == end
        there = decode(ids).split("<|endoftext|>")[:-1]
        assert there == texts[cut : cut + len(there)]
        cut += len(there)
    assert cut == len(texts)
    assert made.num_train_bytes + made.num_val_bytes == len("".join(texts).encode())
    assert 0.65 < made.num_train_bytes / (made.num_train_bytes + made.num_val_bytes) < 0.75


@pytest.mark.parametrize(("val_fraction", "num"), [(0.001, 2), (0.999, 1)])
def test_few_records_leave_neither_split_empty(tmp_path, val_fraction, num):
    documents = split(write(tmp_path, {"a.jsonl": records("aa", "bb", "cc")}) + "/a.jsonl", val_fraction)
    assert (documents.train[0].text(), documents.val[0].text()) == ("aabbcc"[: 2 * num], "aabbcc"[2 * num :])


def test_one_record_is_cut_as_a_text_and_ends_once(tmp_path):
    documents = split(write(tmp_path, {"a.jsonl": records("abcdefghij")}) + "/a.jsonl", 0.3)
    assert list(documents.train[0].pieces()) == ["abcdefg"]
    assert list(documents.val[0].pieces()) == ["hij", None]


def piped(path, content):
    """A named pipe that another thread writes `content` to, once."""
    os.mkfifo(path)

    def feed():
        with suppress(BrokenPipeError), path.open("wb") as pipe:
            pipe.write(content)

    thread = threading.Thread(target=feed, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_pipe_is_read_once_and_kept_no_longer(tmp_path, monkeypatch, pack):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    writer = piped(tmp_path / "pipe", pack(PROSE.encode()))
    made = prepare(DataConfig(data=str(tmp_path / "pipe"), tokenizer="bpe:300"), tmp_path / "tokens")
    writer.join(10)
    assert made.tokenizer.decode([*made.train.tolist(), *made.val.tolist()]) == PROSE
    gc.collect()
    assert {path.name for path in tmp_path.iterdir()} == {"pipe", "tokens"}


def test_of_a_long_pipe_no_more_is_read_than_is_wanted(tmp_path):
    piped(tmp_path / "pipe", b"text " * 2_000_000)
    data = DataConfig(data=str(tmp_path / "pipe"), tokenizer="byte", text_mb=0.01)
    made = prepare(data, tmp_path / "tokens")
    assert len(made.train) + len(made.val) == 10_000


def test_a_bad_pipe_is_named_and_not_its_copy(tmp_path):
    piped(tmp_path / "pipe", b"\xff")
    with pytest.raises(ValueError, match="pipe' is not UTF-8 text: byte 0xFF at offset 0"):
        split(tmp_path / "pipe")


def test_a_device_is_refused():
    with pytest.raises(ValueError, match=r"data '/dev/zero' is a device or a socket, which may never end. Give a text"):
        find_source("/dev/zero")


def test_a_large_file_is_never_whole_in_memory(tmp_path):
    (tmp_path / "large.txt").write_bytes(b"some text and more\n" * 2_000_000)
    tracemalloc.start()
    try:
        documents = split(tmp_path / "large.txt")
        assert sum(len(piece) for piece in pieces(documents.train[0].pieces())) == 34_200_000
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()


# --- tokens


@given(st.text(alphabet="ab1' \n\t.é日"), st.integers(1, 20), st.integers(1, 30))
@settings(deadline=None)
def test_pieces_are_the_text_however_it_is_read(text, length, chunk):
    cut = list(pieces([text], length))
    assert "".join(cut) == text
    assert all(0 < len(piece) <= 2 * length for piece in cut)
    assert list(pieces((text[at : at + chunk] for at in range(0, len(text), chunk)), length)) == cut
    assert list(pieces([text, None, None, text], length)) == [*cut, None, None, *cut]


def test_bpe_of_the_pieces_is_bpe_of_the_whole():
    # Dense in the places that GPT-2's pattern treats in its own way: runs of space, contractions, digits, marks.
    random = np.random.default_rng(0)
    parts = ["the", "we'll", "  ", " ", " ", "\n", "\n\n", "    return", "12", "...", "\t", "日本", "x"]
    text = "".join(random.choice(parts) for _ in range(30_000))
    tokenizer = Tokenizer.from_spec("bpe:300", lambda: [text])
    cut = list(pieces([text], 300))
    assert len(cut) > 200
    assert all(len(piece) < 600 for piece in cut)  # none was cut for want of a place
    assert [token for ids in tokenizer.encode_batch(cut) for token in ids] == tokenizer.encode(text)


def test_char_tokens_are_nanogpts(prose, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "BATCH_CHARACTERS", 700)
    made = prepare(DataConfig(data=prose, tokenizer="char"), tmp_path / "tokens")
    index = {char: place for place, char in enumerate(sorted(set(PROSE)))}
    cut = int(len(PROSE) * 0.9)
    assert made.train.tolist() == [index[char] for char in PROSE[:cut]]
    assert made.val.tolist() == [index[char] for char in PROSE[cut:]]
    assert (made.train.dtype, made.tokenizer.vocab_size) == (np.dtype("<u2"), len(index))
    assert (made.num_train_bytes, made.num_val_bytes) == (cut, len(PROSE) - cut)
    assert isinstance(made.train, np.memmap)


@pytest.mark.parametrize("tokenizer", ["byte", "bpe:300", "char"])
def test_files_decode_to_their_text_each_with_its_end(tmp_path, tokenizer):
    files = {f"{index}.txt": f"line {index} é 🙂\n" * (index + 1) for index in range(12)}
    write(tmp_path / "data", files)
    made = prepare(DataConfig(data=str(tmp_path / "data"), tokenizer=tokenizer, val_fraction=0.3), tmp_path / "tokens")
    documents = split(tmp_path / "data", 0.3)
    end = made.tokenizer.end_of_text
    for tokens, texts, num_bytes in (
        (made.train, documents.train, made.num_train_bytes),
        (made.val, documents.val, made.num_val_bytes),
    ):
        expected = "".join(document.text() for document in texts)
        assert made.tokenizer.decode([token for token in tokens.tolist() if token != end]) == expected
        assert num_bytes == len(expected.encode())
        assert (tokens == (-1 if end is None else end)).sum() == (0 if end is None else len(texts))


def test_a_bpe_never_sees_validation_text(tmp_path):
    write(tmp_path, {"a.txt": "abcabc " * 200 + "zqzqzq " * 20})
    made = prepare(DataConfig(data=str(tmp_path / "a.txt"), tokenizer="bpe:300", val_fraction=0.09), tmp_path / "t")
    assert len(made.tokenizer.encode("zqzqzq")) == 6
    assert len(made.tokenizer.encode(" abcabc")) < 4


def test_a_bpe_learns_from_a_sample_of_large_text(prose, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "BPE_SAMPLE_BYTES", 100)
    made = prepare(DataConfig(data=prose, tokenizer="bpe:300"), tmp_path / "tokens")
    assert made.tokenizer.decode(made.train.tolist()) == PROSE[: int(len(PROSE) * 0.9)]
    assert json.loads((tmp_path / "tokens" / "meta.json").read_text())["largest_bpe_sample_bytes"] == 100


def test_a_wide_vocabulary_takes_four_bytes(prose, tmp_path):
    wide = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "speak": 70_000}, unk_token="<unk>"))
    wide.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    wide.save(str(tmp_path / "wide.json"))
    made = prepare(DataConfig(data=prose, tokenizer=str(tmp_path / "wide.json")), tmp_path / "tokens")
    assert made.train.dtype == np.dtype("<u4")
    assert made.train.max() == 70_000


def test_progress_goes_up_to_the_whole_in_each_stage(prose, tmp_path):
    seen = {}

    def progress(stage, done, total):
        assert seen.get(stage, (0, total))[0] <= done <= total
        seen[stage] = (done, total)

    prepare(DataConfig(data=prose, tokenizer="bpe:300"), tmp_path / "tokens", progress=progress)
    assert list(seen) == ["reading", "training the tokenizer", "tokenizing"]
    assert all(done == total for done, total in seen.values())


# --- reuse, and what a kill leaves


def config(prose):
    return DataConfig(data=prose, tokenizer="bpe:300")


def state(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_tokens_are_reused_without_writing(prose, tmp_path):
    directory = tmp_path / "tokens"
    first = prepare(config(prose), directory)
    times = {path: path.stat().st_mtime_ns for path in directory.iterdir()}
    again = prepare(config(prose), directory)
    assert (first.reused, again.reused) == (False, True)
    assert {path.name for path in times} == {"train.bin", "val.bin", "tokenizer.json", "meta.json"}
    assert {path: path.stat().st_mtime_ns for path in directory.iterdir()} == times
    np.testing.assert_array_equal(again.train, first.train)
    np.testing.assert_array_equal(again.val, first.val)
    assert again.tokenizer.fingerprint == first.tokenizer.fingerprint
    assert (again.num_train_bytes, again.num_val_bytes) == (first.num_train_bytes, first.num_val_bytes)


def test_touching_a_file_is_no_change_and_changing_what_counts_is(prose, tmp_path):
    directory = tmp_path / "tokens"
    prepare(config(prose), directory)
    os.utime(prose)
    assert prepare(config(prose), directory).reused
    Path(prose).write_text(PROSE.replace("speak", "shout"))
    changed = prepare(config(prose), directory)
    assert not changed.reused
    assert "shout" in changed.tokenizer.decode(changed.train.tolist())
    assert not prepare(DataConfig(data=prose, tokenizer="bpe:290"), directory).reused
    assert not prepare(DataConfig(data=prose, tokenizer="bpe:290", val_fraction=0.2), directory).reused


def test_a_tokenizer_file_that_changes_is_noticed(prose, tmp_path):
    spec = str(tmp_path / "mine.json")
    for text in ("abcd", PROSE):
        Tokenizer.from_spec("bpe:300", lambda text=text: [text]).save(spec)
        assert not prepare(DataConfig(data=prose, tokenizer=spec), tmp_path / "tokens").reused
    assert prepare(DataConfig(data=prose, tokenizer=spec), tmp_path / "tokens").reused


def test_a_new_file_in_a_directory_or_library_is_noticed(tmp_path):
    data = write(tmp_path / "data", {f"{index}.txt": PROSE for index in range(4)})
    byte = DataConfig(data=data, tokenizer="byte")
    prepare(byte, tmp_path / "tokens")
    assert prepare(byte, tmp_path / "tokens").reused
    write(tmp_path / "data", {"more.txt": PROSE})
    assert not prepare(byte, tmp_path / "tokens").reused
    root = small_stdlib(tmp_path / "library")
    library = DataConfig(data="stdlib", tokenizer="byte")
    assert not prepare(library, tmp_path / "tokens", source=stdlib_source(root)).reused
    assert prepare(library, tmp_path / "tokens", source=stdlib_source(root)).reused
    write(root, {"new.py": "x = 1\n"})
    assert not prepare(library, tmp_path / "tokens", source=stdlib_source(root)).reused


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "tokenizer.json", "meta.json"])
@pytest.mark.parametrize("damage", ["absent", "empty", "truncated", "changed"])
def test_damage_is_noticed_and_mended(prose, tmp_path, name, damage):
    directory = tmp_path / "tokens"
    prepare(config(prose), directory)
    whole = state(directory)
    content = whole[name]
    if damage == "absent":
        (directory / name).unlink()
    else:
        damaged = {"empty": b"", "truncated": content[:-3], "changed": b"[{]0" + content[4:]}[damage]
        (directory / name).write_bytes(damaged)
    mended = prepare(config(prose), directory)
    assert not mended.reused
    assert state(directory) == whole
    assert prepare(config(prose), directory).reused


def test_a_token_changed_anywhere_is_noticed(tmp_path):
    text = write(tmp_path, {"long.txt": PROSE * 70}) + "/long.txt"
    directory = tmp_path / "tokens"
    byte = DataConfig(data=text, tokenizer="byte")
    prepare(byte, directory)
    whole = state(directory)
    draw = np.random.default_rng(0)
    for name in ("train.bin", "val.bin"):
        size = len(whole[name])
        assert name == "val.bin" or size > 3 << 16
        for place in (0, size // 2, size - 1, *draw.integers(0, size, 3)):
            content = bytearray(whole[name])
            content[place] ^= 1 << int(draw.integers(8))
            (directory / name).write_bytes(content)
            assert not prepare(byte, directory).reused, (name, place)
            assert state(directory) == whole


def test_other_text_of_equal_size_and_time_is_noticed(tmp_path):
    def change(path):
        before = path.stat()
        path.write_text(path.read_text().replace("x", "y"))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)

    folder = Path(write(tmp_path / "data", {"a.txt": "x = 1 " * 99, "b.txt": PROSE, "c.txt": PROSE}))
    library = small_stdlib(tmp_path / "library")
    write(library, {"module_1.py": "x = 1\n"})
    for data, source, path in (
        (str(folder / "a.txt"), find_source(str(folder / "a.txt")), folder / "a.txt"),
        (str(folder), find_source(str(folder)), folder / "a.txt"),
        ("stdlib", stdlib_source(library), library / "module_1.py"),
    ):
        config, directory = DataConfig(data=data, tokenizer="byte"), tmp_path / "tokens"
        path.write_text(path.read_text().replace("y", "x"))
        prepare(config, directory, source=source)
        assert prepare(config, directory, source=source).reused
        change(path)
        made = prepare(config, directory, source=source)
        assert not made.reused
        text = made.tokenizer.decode(made.train.tolist()) + made.tokenizer.decode(made.val.tolist())
        assert "y = 1" in text


def test_only_the_files_taken_of_a_folder_count(tmp_path):
    for index in range(20):
        (tmp_path / f"{index}.txt").write_text(f"file {index} " * 50)
    source = find_source(str(tmp_path))
    part = limited(source, 0.002)
    fingerprint = part.fingerprint()
    (next(path for name, path in source.paths.items() if name not in part.paths)).write_text("other text")
    assert part.fingerprint() == fingerprint
    next(iter(part.paths.values())).write_text("other text")
    assert part.fingerprint() != fingerprint


def test_a_text_that_cannot_be_read_is_one_line(tmp_path):
    source = find_source(write(tmp_path, {"a.txt": PROSE, "b.txt": PROSE}))
    (tmp_path / "b.txt").unlink()
    with pytest.raises(ValueError, match=r"b\.txt' cannot be read or written: No such file") as caught:
        prepare(DataConfig(data=str(tmp_path), tokenizer="byte"), tmp_path / "tokens", source=source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("left", [0, 100, 6000])
def test_a_file_cut_short_while_it_is_in_use_is_an_error_and_no_signal(prose, tmp_path, left):
    directory = tmp_path / "tokens"
    made = prepare(DataConfig(data=prose, tokenizer="byte"), directory)
    source = BatchSource(tokens=made.train, seq=8, batch=4, seed=0)
    part = BatchSource(tokens=made.train[100:], seq=8, batch=4, seed=0)
    windows = ValidationWindows(tokens=made.val, seq=8, batch=4)
    source.batch_at(0), windows.batch_at(0)
    for name in ("train.bin", "val.bin"):
        os.truncate(directory / name, min(left, (directory / name).stat().st_size - 1))
    reads = (source.batch_at, part.batch_at, windows.batch_at, lambda _: tokens_fingerprint(made))
    for read in reads:
        with pytest.raises(OSError, match=r"a token file in .*tokens was cut short while it was in use") as caught:
            read(0)
        assert "\n" not in str(caught.value)
    mended = prepare(DataConfig(data=prose, tokenizer="byte"), directory)
    assert (len(mended.train), len(mended.val)) == (len(made.train), len(made.val))


def test_a_file_replaced_while_it_is_in_use_changes_nothing(prose, tmp_path):
    made = prepare(DataConfig(data=prose, tokenizer="byte"), tmp_path / "tokens")
    before = made.train.tolist()
    prepare(DataConfig(data=prose, tokenizer="bpe:300"), tmp_path / "tokens")
    BatchSource(tokens=made.train, seq=8, batch=4, seed=0).batch_at(0)
    assert made.train.tolist() == before


KILL = """
import os, sys
from pathlib import Path
from gcompute.config.train import DataConfig
from gcompute.train.corpus import prepare
data, directory, countdown = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
def dying(call):
    def counted(*arguments, **keywords):
        global countdown
        countdown -= 1
        if countdown == 0:
            os.kill(os.getpid(), 9)
        return call(*arguments, **keywords)
    return counted
for name in ("fsync", "replace", "unlink"):
    setattr(os, name, dying(getattr(os, name)))
prepare(DataConfig(data=data, tokenizer="bpe:300"), directory)
"""


def test_a_kill_at_any_file_operation_leaves_nothing_broken(prose, tmp_path):
    directory = tmp_path / "tokens"
    prepare(config(prose), tmp_path / "whole")
    prepare(DataConfig(data=prose, tokenizer="byte"), directory)  # something else, to be replaced
    whole = state(tmp_path / "whole")
    for countdown in range(1, 30):
        command = [sys.executable, "-c", KILL, prose, str(directory), str(countdown)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            break
        assert done.returncode == -9, done.stderr
        made = prepare(config(prose), tmp_path / "tokens")
        np.testing.assert_array_equal(made.train, np.frombuffer(whole["train.bin"], "<u2"))
        assert {name: content for name, content in state(directory).items() if not name.endswith(".tmp")} == whole
        prepare(DataConfig(data=prose, tokenizer="byte"), directory)
    assert countdown > 7  # 4 files are synced and 4 replaced, so that many kills were tried


def test_what_killed_processes_left_goes_once_it_is_old(prose, tmp_path):
    directory = tmp_path / "tokens"
    write(directory, {".train.bin.1.tmp": "old", ".train.bin.2.tmp": "of a process at work"})
    os.utime(directory / ".train.bin.1.tmp", (0, 0))
    prepare(config(prose), directory)
    assert {path.name for path in directory.iterdir() if path.suffix == ".tmp"} == {".train.bin.2.tmp"}


def test_processes_that_prepare_different_tokens_at_once_each_get_their_own(prose, tmp_path):
    code = (
        "import sys; from pathlib import Path; import numpy as np\n"
        "from gcompute.config.train import DataConfig; from gcompute.train.corpus import prepare\n"
        "for _ in range(15):\n"
        "    made = prepare(DataConfig(data=sys.argv[1], tokenizer=sys.argv[3]), Path(sys.argv[2]))\n"
        "    text = made.tokenizer.decode(made.train.tolist()) + made.tokenizer.decode(made.val.tolist())\n"
        "    assert text == Path(sys.argv[1]).read_text()\n"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code, prose, str(tmp_path / "tokens"), spec], stderr=subprocess.PIPE)
        for spec in ("bpe:300", "byte", "byte")
    ]
    for process in processes:
        _, stderr = process.communicate(timeout=60)
        assert (process.returncode, stderr) == (0, b"")
    prepare(config(prose), tmp_path / "tokens")
    assert prepare(config(prose), tmp_path / "tokens").reused


def test_a_full_disk_is_one_line_and_keeps_what_was_there(prose, tmp_path):
    # A limit on file size stands for the full disk: both fail the write itself, late, with an OSError.
    code = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from gcompute.config.train import DataConfig; from gcompute.train.corpus import prepare\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))\n"
        "try: prepare(DataConfig(data=sys.argv[1], tokenizer='byte'), Path(sys.argv[2]))\n"
        "except ValueError as error: print(error)\n"
    )
    directory = tmp_path / "tokens"
    prepare(config(prose), directory)
    before = state(directory)
    done = subprocess.run(
        [sys.executable, "-c", code, prose, str(directory)], capture_output=True, text=True, check=True
    )
    assert "cannot be read or written: File too large" in done.stdout
    assert done.stdout.count("\n") == 1
    assert state(directory) == before


def test_a_directory_that_cannot_be_made_is_one_line(prose, tmp_path):
    with pytest.raises(ValueError, match="cannot be read or written: Not a directory") as caught:
        prepare(config(prose), Path(prose) / "tokens")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spec", ["bpe:abc", "bpe:10", "bytes", "missing.json"])
def test_a_bad_tokenizer_leaves_nothing(prose, tmp_path, spec):
    with pytest.raises(ValueError, match="tokenizer"):
        prepare(DataConfig(data=prose, tokenizer=spec), tmp_path / "tokens")
    assert not (tmp_path / "tokens").exists()


def test_some_megabytes_of_a_folder_are_whole_files_of_both_splits(tmp_path):
    for index in range(200):
        (tmp_path / f"{index}.txt").write_text(f"file {index} " * 50)
    source = find_source(str(tmp_path))
    part = limited(source, 0.02)
    size = sum(path.stat().st_size for path in part.paths.values())
    assert 0.02e6 <= size < 0.0215e6
    assert limited(source, 0.02) == part
    assert set(limited(source, 0.01).paths) < set(part.paths) < set(source.paths)
    assert part.fingerprint() not in (source.fingerprint(), limited(source, 0.01).fingerprint())
    documents = split_documents(part, 0.1, lambda *_: None)
    assert 0 < len(documents.val) < len(documents.train)
    assert len(limited(source, 1e-6).paths) == 1
    assert limited(source, None) is source


def test_some_megabytes_of_one_file_are_its_beginning(tmp_path):
    (tmp_path / "one.txt").write_text("é" * 2000)
    data = DataConfig(data=str(tmp_path / "one.txt"), tokenizer="char", text_mb=0.001001)
    corpus = prepare(data, tmp_path / "tokens")
    assert len(corpus.train) + len(corpus.val) == 500


def test_no_megabytes_are_refused():
    with pytest.raises(ValueError, match="text_mb must be above 0"):
        DataConfig(text_mb=0)
