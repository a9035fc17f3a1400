import hashlib
import json
import subprocess
import sys

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from gcompute.model.tokenizer import END_OF_TEXT, StreamDecoder, Tokenizer

SAMPLE = [
    "def add(a, b):\n    return a + b\n\n\nclass Café:\n    def __init__(self):\n        self.total = 0\n" * 20,
    "import os\n\nfor name in os.listdir():\n    print(name, 'naïve', '日本語', '🙂')\n" * 20,
]


def no_texts():
    raise AssertionError("texts were read")


def make(spec):
    return Tokenizer.from_spec(spec, lambda: SAMPLE)


BYTE = Tokenizer.from_spec("byte", no_texts)
BPE = make("bpe:320")


def sentencepiece_like():
    """A tokenizer of the Llama 2 kind: ▁ for a space, dropped at the start, and byte fallback."""
    pieces = ["▁", "▁a", "a", "b", "▁b", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=[("▁", "a"), ("▁", "b")],
            byte_fallback=True,
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(backend)


@given(st.text())
@settings(deadline=None)
def test_byte_ids_are_the_utf8_bytes(text):
    assert BYTE.encode(text) == list(text.encode())
    assert BYTE.decode(BYTE.encode(text)) == text


@given(st.text())
@settings(deadline=None)
def test_bpe_round_trips_any_text(text):
    assert BPE.decode(BPE.encode(text)) == text


@given(st.text(alphabet=sorted(set("".join(SAMPLE)))))
@settings(deadline=None)
def test_char_ids_follow_sorted_order(text):
    tokenizer = make("char")
    alphabet = sorted(set("".join(SAMPLE)))
    assert tokenizer.encode(text) == [alphabet.index(char) for char in text]
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.oldest
def test_vocabulary_sizes_and_end_of_text():
    assert (BYTE.vocab_size, BYTE.end_of_text) == (257, 256)
    assert (BPE.vocab_size, BPE.decode([BPE.end_of_text])) == (320, END_OF_TEXT)
    char = make("char")
    assert (char.vocab_size, char.end_of_text) == (len(set("".join(SAMPLE))), None)


def test_bpe_merges_what_is_frequent():
    assert len(BPE.encode(SAMPLE[0])) < 0.5 * len(SAMPLE[0].encode())


@pytest.mark.parametrize("spec", ["byte", "bpe:320"])
def test_end_of_text_spelled_out_is_ordinary_text(spec):
    tokenizer = make(spec)
    ids = tokenizer.encode(f"a{END_OF_TEXT}b")
    assert tokenizer.end_of_text not in ids
    assert tokenizer.decode(ids) == f"a{END_OF_TEXT}b"


def test_bpe_training_is_deterministic_and_does_not_depend_on_the_iterator():
    again = Tokenizer.from_spec("bpe:320", lambda: (text for text in SAMPLE))
    assert again.fingerprint == BPE.fingerprint
    assert make("bpe:321").fingerprint != BPE.fingerprint


@pytest.mark.parametrize("spec", ["byte", "char", "bpe:320"])
def test_save_and_load_keep_everything(spec, tmp_path):
    tokenizer = make(spec)
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.from_spec(str(tmp_path / "tokenizer.json"), no_texts)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]
    assert loaded.fingerprint == tokenizer.fingerprint
    assert (loaded.vocab_size, loaded.end_of_text) == (tokenizer.vocab_size, tokenizer.end_of_text)
    assert loaded.encode_batch(SAMPLE) == tokenizer.encode_batch(SAMPLE)
    if spec == "char":
        with pytest.raises(ValueError, match="does not know"):
            loaded.encode("\x07")


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path):
    path = tmp_path / "tokenizer.json"
    BPE.save(path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert Tokenizer.load(path).fingerprint == BPE.fingerprint


def test_saved_file_is_what_hugging_face_reads(tmp_path):
    BPE.save(tmp_path / "tokenizer.json")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert theirs.encode(SAMPLE[0]).ids == BPE.encode(SAMPLE[0])
    canonical = json.dumps(json.loads((tmp_path / "tokenizer.json").read_text()), sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(canonical.encode()).hexdigest() == BPE.fingerprint


def test_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    BYTE.save(tmp_path / "tokenizer.json")
    before = (tmp_path / "tokenizer.json").read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        BPE.save(tmp_path / "tokenizer.json")
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]
    assert (tmp_path / "tokenizer.json").read_bytes() == before


def test_truncation_and_padding_of_a_loaded_file_are_ignored(tmp_path):
    backend = tokenizers.Tokenizer.from_str(BPE._backend.to_str())
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(tmp_path / "tokenizer.json").encode(SAMPLE[0]) == BPE.encode(SAMPLE[0])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("bpe", "needs a vocabulary size"),
        ("bpe:", "needs a vocabulary size"),
        ("bpe:abc", "needs a vocabulary size"),
        ("bpe:-5", "needs a vocabulary size"),
        ("bpe:10", "at least 258"),
        ("bpe:257", "at least 258"),
        ("bytes", "Did you mean 'byte'"),
        ("chars", "Did you mean 'char'"),
        ("bpe4096", "Did you mean 'bpe:4096'"),
        ("zzz", "Legal: byte, char"),
        ("nowhere/tokenizer.json", "No such file"),
    ],
)
def test_bad_specs_are_one_line(spec, message):
    with pytest.raises(ValueError, match=message) as caught:
        Tokenizer.from_spec(spec, no_texts)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"hello", b"{}", b'{"version": "1.0"}', b"\xff\xfe", b"[1, 2"])
def test_a_file_that_does_not_parse_is_one_line(content, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="does not parse") as caught:
        Tokenizer.load(path)
    assert "\n" not in str(caught.value)


def test_a_file_without_tokens_and_a_directory_are_refused(tmp_path):
    tokenizers.Tokenizer(models.BPE()).save(str(tmp_path / "empty.json"))
    with pytest.raises(ValueError, match="no tokens"):
        Tokenizer.load(tmp_path / "empty.json")
    with pytest.raises(ValueError, match="Is a directory"):
        Tokenizer.from_spec(str(tmp_path), no_texts)


def test_unknown_character_is_named():
    with pytest.raises(ValueError, match=r"'€' \(U\+20AC, character 3") as caught:
        make("char").encode("def€")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spec", ["byte", "char", "bpe:320"])
def test_half_a_surrogate_pair_is_refused(spec):
    with pytest.raises(ValueError, match="character 1 is half of a surrogate pair"):
        make(spec).encode("a\ud800")


def test_a_char_tokenizer_needs_text():
    with pytest.raises(ValueError, match="needs text"):
        Tokenizer.from_spec("char", list)


def stream(tokenizer, ids):
    decoder = StreamDecoder(tokenizer)
    return [*(decoder.push(token_id) for token_id in ids), decoder.flush()]


@given(st.binary(max_size=40), st.booleans())
@settings(deadline=None)
def test_streamed_bytes_equal_decode_whatever_the_bytes(data, ended):
    ids = [*data, *([256] if ended else [])]
    assert "".join(stream(BYTE, ids)) == BYTE.decode(ids)
    if not ended:
        assert BYTE.decode(ids) == data.decode(errors="replace")


@given(st.lists(st.integers(0, 325), max_size=40))
@settings(deadline=None)
def test_streamed_bpe_equals_decode_for_any_ids(ids):
    assert "".join(stream(BPE, ids)) == BPE.decode(ids)


@given(st.text(alphabet="ab é日🙂"))
@settings(deadline=None)
def test_streamed_sentencepiece_equals_decode(text):
    tokenizer = sentencepiece_like()
    ids = tokenizer.encode(text)
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.oldest
def test_stream_holds_back_only_unfinished_characters():
    assert stream(BYTE, "aé🙂b".encode()) == ["a", "", "é", "", "", "", "🙂", "b", ""]
    assert stream(BYTE, b"a\xffb") == ["a", "\ufffd", "b", ""]
    assert stream(BYTE, b"\xe6\x97") == ["", "", "\ufffd"]
    assert stream(make("char"), make("char").encode("日本")) == ["日", "本", ""]
    assert stream(sentencepiece_like(), sentencepiece_like().encode("a éb"))[-2:] == ["b", ""]


def test_flush_starts_afresh():
    decoder = StreamDecoder(BYTE)
    assert [decoder.push(0xF0), decoder.flush(), decoder.push(97), decoder.flush()] == ["", "\ufffd", "a", ""]


def test_a_fork_after_a_batch_neither_warns_nor_hangs():
    code = (
        "import os; os.environ.pop('TOKENIZERS_PARALLELISM', None)\n"
        "from gcompute.model.tokenizer import Tokenizer\n"
        "tokenizer = Tokenizer.from_spec('byte', list)\n"
        "tokenizer.encode_batch(['a' * 1000] * 64)\n"
        "pid = os.fork()\n"
        "tokenizer.encode_batch(['a' * 1000] * 64)\n"
        "os._exit(0) if pid == 0 else os.waitpid(pid, 0)\n"
    )
    # From 3.12 on Python itself says of any process with threads that it should not fork: that is not tokenizers' word.
    command = [sys.executable, "-W", "ignore:This process:DeprecationWarning", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert (done.stdout, done.stderr) == ("", "")


@given(st.text())
@example("a" * 999)
@example(END_OF_TEXT * 9)
def test_no_text_has_fewer_tokens_than_the_bound(text: str):
    for kind in (BYTE, BPE):
        assert len(kind.encode(text)) >= kind.least_tokens(text)


def test_the_bound_of_a_byte_tokenizer_and_where_there_is_none():
    byte = Tokenizer.from_spec("byte", list)
    longest = max(len(byte.spell(token_id)) for token_id in range(byte.vocab_size))
    assert byte.least_tokens("é" * 500) == -(-1000 // longest)
    assert Tokenizer.from_spec("char", lambda: ["ab"]).least_tokens("a" * 1000) == 0
