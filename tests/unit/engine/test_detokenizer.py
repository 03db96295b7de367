"""Streamed text equals the tokenizer's own decode, however it is cut."""

import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from lamina.engine.detokenizer import Detokenizer, describe_logprobs
from lamina.engine.tokenizer import Tokenizer, load_tokenizer
from lamina.errors import CheckpointError, RequestError
from lamina.types import SamplingParams, TokenLogprobs

TEXTS = [
    "the quick brown fox jumps over the lazy dog, and the dog does not mind.",
    "naïve café, Zoë — façade; e\u0301 is e with a combining accent",
    "日本語のテキストと你好世界",
    "😀😃 family: 👨‍👩‍👧 flag: 🇩🇪",
    "  two  spaces\n\tand a tab\n",
]


def wrap(backend: Backend) -> Tokenizer:
    hf = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    hf.add_tokens(["<tool>", AddedToken("two words", special=False)])
    return Tokenizer(hf)


@functools.cache
def byte_level() -> Tokenizer:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    return wrap(backend)


def byte_fallback_bpe() -> Backend:
    words = ["▁", "▁the", "▁dog", "the", "▁▁", "é", "日", "a", "b", "e", "g", "h", "d", "o", "t"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = [("d", "o"), ("do", "g"), ("▁", "dog"), ("t", "h"), ("th", "e"), ("▁", "the")]
    for left, right in [*merges, ("▁", "▁")]:
        vocab.setdefault(left + right, len(vocab))
    model = models.BPE(
        vocab, [*merges, ("▁", "▁")], unk_token="<unk>", byte_fallback=True, fuse_unk=True
    )
    backend = Backend(model)
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


@functools.cache
def llama_like() -> Tokenizer:
    backend = byte_fallback_bpe()
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return wrap(backend)


@functools.cache
def metaspace() -> Tokenizer:
    backend = byte_fallback_bpe()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always"), decoders.Fuse()]
    )
    return wrap(backend)


@functools.cache
def word_piece() -> Tokenizer:
    words = ["<unk>", "<s>", "</s>", "dog", "the", "##s", "##é", "日", ",", "a"]
    backend = Backend(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece(cleanup=False)
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return wrap(backend)


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "byte_level": byte_level,
    "llama_like": llama_like,
    "metaspace": metaspace,
    "word_piece": word_piece,
}
every_tokenizer = pytest.mark.parametrize("make", TOKENIZERS.values(), ids=TOKENIZERS)


def stream(
    tokenizer: Tokenizer,
    token_ids: Sequence[int],
    prompt: Sequence[int] = (),
    cuts: Sequence[int] = (),
    **sampling: object,
) -> tuple[str, str | None, int, list[str]]:
    """(text, stop, tokens of the answer, pieces); token by token, or in pushes of `cuts` tokens."""
    detokenizer = Detokenizer(tokenizer, SamplingParams(**sampling), prompt)
    pieces, num_tokens, position = [], 0, 0
    lengths = list(cuts)
    while True:
        size = lengths.pop(0) if lengths else 1
        part = token_ids[position : position + size]
        position += len(part)
        finished = position >= len(token_ids)
        pushed = detokenizer.push(part, finished)
        pieces.append(pushed.text)
        num_tokens += pushed.num_tokens
        if finished or pushed.stop is not None:
            return "".join(pieces), pushed.stop, num_tokens, pieces


def byte_runs_are_valid(tokenizer: Tokenizer, token_ids: Sequence[int], skip: bool) -> bool:
    """Whether every run of byte tokens is whole characters."""
    run = b""
    for token_id in [*token_ids, -1]:
        token = tokenizer.hf.convert_ids_to_tokens(token_id) if token_id >= 0 else ""
        if skip and tokenizer.is_special(token_id):
            continue
        if token.startswith("<0x"):
            run += bytes.fromhex(token[3:5])
            continue
        try:
            run.decode()
        except UnicodeDecodeError:
            return False
        run = b""
    return True


@every_tokenizer
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_random_tokens_stream_to_what_decode_gives(
    make: Callable[[], Tokenizer], data: st.DataObject
) -> None:
    tokenizer = make()
    token = st.integers(0, len(tokenizer) - 1)
    if make in (llama_like, metaspace):
        # Whole characters as byte tokens among the other tokens.
        spelled = st.sampled_from(" e\n~é日\u0301😀").map(
            lambda char: [tokenizer.hf.convert_tokens_to_ids(f"<0x{b:02X}>") for b in char.encode()]
        )
        parts = st.lists(st.one_of(spelled, token.map(lambda t: [t])), max_size=12)
        token_ids = list(itertools.chain.from_iterable(data.draw(parts)))
    else:
        token_ids = data.draw(st.lists(token, max_size=25))
    skip = data.draw(st.booleans())
    if not byte_runs_are_valid(tokenizer, token_ids, skip):
        return  # transformers then turns even the whole characters of the run into U+FFFD
    prompts = st.sampled_from(["", "the dog", "<s>", "<s>the", "the<s>"])
    prompt = tokenizer.encode(data.draw(prompts), add_special_tokens=False)
    cuts = data.draw(st.lists(st.integers(0, 4), max_size=10))
    text, stop, num_tokens, _ = stream(tokenizer, token_ids, prompt, cuts, skip_special_tokens=skip)
    before = tokenizer.decode(prompt, skip_special_tokens=skip)
    whole = tokenizer.decode([*prompt, *token_ids], skip_special_tokens=skip)
    assert (before + text, stop, num_tokens) == (whole, None, len(token_ids))


@every_tokenizer
@given(text=st.text(max_size=20))
@settings(max_examples=100, deadline=None)
def test_texts_survive(make: Callable[[], Tokenizer], text: str) -> None:
    tokenizer = make()
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    streamed, _, _, pieces = stream(tokenizer, token_ids)
    assert streamed == tokenizer.decode(token_ids)
    assert "\ufffd" in streamed or not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("make", [byte_level, llama_like, metaspace])
@pytest.mark.parametrize("text", ["😀", "👨‍👩‍👧", "日本", "e\u0301", "naïve"])
def test_no_piece_ends_inside_a_character(make: Callable[[], Tokenizer], text: str) -> None:
    tokenizer = make()
    hf = tokenizer.hf
    if make is byte_level:
        token_ids = [byte_token(b) for b in text.encode()]
    else:
        token_ids = [hf.convert_tokens_to_ids(f"<0x{b:02X}>") for b in text.encode()]
    streamed, _, _, pieces = stream(tokenizer, token_ids, (5,))
    assert streamed == text
    assert [p for p in pieces if p] == list(text)  # each character as soon as it is whole


def byte_token(byte: int) -> int:
    """The byte-level vocabulary's token of one byte."""
    return token_id_of(bytes_to_unicode()[byte])


def token_id_of(char: str) -> int:
    token_id: int = byte_level().hf.convert_tokens_to_ids(char)
    return token_id


@pytest.mark.parametrize("make", [byte_level, llama_like])
def test_incomplete_bytes_at_the_end_are_replaced(make: Callable[[], Tokenizer]) -> None:
    tokenizer = make()
    if make is byte_level:
        start = [byte_token(b) for b in "😀".encode()[:2]]
    else:
        start = [tokenizer.hf.convert_tokens_to_ids(t) for t in ("<0xF0>", "<0x9F>")]
    text, _, _, pieces = stream(tokenizer, start, (5,))
    assert text == "\ufffd"
    assert pieces[:-1] == [""]


def test_an_invalid_byte_does_not_undo_the_characters_before_it() -> None:
    tokenizer = llama_like()
    token_ids = [
        tokenizer.hf.convert_tokens_to_ids(t) for t in ("<0xC3>", "<0xA9>", "<0xFF>", "dog")
    ]
    assert stream(tokenizer, token_ids, (5,))[3] == ["", "é", "\ufffd", "dog"]


def test_an_answer_keeps_the_space_after_the_prompt() -> None:
    tokenizer = llama_like()
    prompt = tokenizer.encode("the dog", add_special_tokens=False)
    answer = tokenizer.encode("the", add_special_tokens=False)
    assert stream(tokenizer, answer, prompt)[0] == " the"
    assert stream(tokenizer, answer, [1])[0] == "the"
    assert stream(tokenizer, answer, [1], skip_special_tokens=False)[0] == " the"


def test_unknown_ids_of_a_padded_vocabulary_are_empty() -> None:
    for make in TOKENIZERS.values():
        tokenizer = make()
        assert stream(tokenizer, [len(tokenizer) + 5], (5,))[0] == ""
        assert tokenizer.token_bytes(len(tokenizer)) == b""


# --- stop strings -------------------------------------------------------------------------------


def letters(text: str) -> list[int]:
    return [byte_level().hf.convert_tokens_to_ids(char) for char in text]


def test_a_stop_string_over_several_tokens_is_cut() -> None:
    text, stop, num_tokens, pieces = stream(byte_level(), letters("xxabcyy"), stop=("abc",))
    assert (text, stop, num_tokens) == ("xx", "abc", 5)
    assert pieces == ["x", "x", "", "", ""]


def test_a_stop_string_inside_one_push() -> None:
    text, stop, num_tokens, _ = stream(byte_level(), letters("xxabcyy"), cuts=[7], stop=("abc",))
    assert (text, stop, num_tokens) == ("xx", "abc", 5)


def test_a_stop_string_can_be_kept() -> None:
    text, stop, *_ = stream(
        byte_level(), letters("xxabcyy"), stop=("abc",), include_stop_str_in_output=True
    )
    assert (text, stop) == ("xxabc", "abc")


def test_a_broken_beginning_is_released() -> None:
    text, stop, _, pieces = stream(byte_level(), letters("aabaabab"), stop=("abac",))
    assert (text, stop) == ("aabaabab", None)
    assert pieces == ["", "a", "", "", "aba", "", "", "abab"]


def test_what_is_held_comes_at_the_end() -> None:
    assert stream(byte_level(), letters("xab"), stop=("abc",))[3] == ["x", "", "ab"]


def test_a_stop_string_that_ends_with_the_flush() -> None:
    token_ids = [*letters("a"), byte_token(0xF0)]
    assert stream(byte_level(), token_ids, stop=("\ufffd",))[:2] == ("a", "\ufffd")


def test_stop_strings_before_min_tokens_are_text() -> None:
    for min_tokens, expected in [(2, ("", "ab")), (3, ("abx", "ab")), (5, ("abx", "ab"))]:
        text, stop, *_ = stream(byte_level(), letters("abxab"), stop=("ab",), min_tokens=min_tokens)
        assert (text, stop) == expected
    assert stream(byte_level(), letters("abxab"), stop=("ab",), min_tokens=6)[:2] == ("abxab", None)


@settings(max_examples=300, deadline=None)
@given(
    text=st.text("ab😀", max_size=14),
    stops=st.lists(st.text("ab😀", min_size=1, max_size=4), min_size=1, max_size=3),
    include=st.booleans(),
    cuts=st.lists(st.integers(0, 5), max_size=8),
)
def test_stop_strings_do_not_depend_on_how_the_text_is_cut(
    text: str, stops: list[str], include: bool, cuts: list[int]
) -> None:
    tokenizer = byte_level()
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    ends = [(text.index(s) + len(s), -len(s), s) for s in stops if s in text]
    end, negative_length, stop = min(ends, default=(len(text), 0, None))
    expected = text[:end] if include else text[: end + negative_length]
    options = {"stop": tuple(stops), "include_stop_str_in_output": include}
    got, got_stop, num_tokens, _ = stream(tokenizer, token_ids, cuts=cuts, **options)
    assert (got, got_stop) == (expected, stop)
    if stop is not None:  # the token that completes the stop string is the answer's last
        assert len(tokenizer.decode(token_ids[:num_tokens])) >= end
        assert stop not in tokenizer.decode(token_ids[: num_tokens - 1])


# --- tokens of log-probabilities ------------------------------------------------------------------


def test_logprob_tokens_have_text_and_exact_bytes() -> None:
    tokenizer = byte_level()
    half = byte_token(0xF0)
    (a,) = letters("a")
    entry = TokenLogprobs(half, -1.5, 2, ((a, -0.5), (0, -0.7)))
    described = describe_logprobs(tokenizer, entry)
    assert (described.token, described.utf8) == ("\ufffd", b"\xf0")
    assert (described.logprob, described.rank) == (-1.5, 2)
    assert described.top == ((a, "a", b"a", -0.5), (0, "<s>", b"<s>", -0.7))


@every_tokenizer
def test_token_bytes_spell_the_text(make: Callable[[], Tokenizer]) -> None:
    tokenizer = make()
    prompt = tokenizer.encode("the", add_special_tokens=False)
    for text in ("the dog", "日", "a dog , a"):
        token_ids = tokenizer.encode(text, add_special_tokens=False)
        spelled = b"".join(tokenizer.token_bytes(t) for t in token_ids)
        whole = tokenizer.decode([*prompt, *token_ids], skip_special_tokens=False)
        assert tokenizer.decode(prompt) + spelled.decode() == whole


# --- the tokenizer itself -------------------------------------------------------------------------


def test_a_saved_tokenizer_is_loaded(tmp_path: Path) -> None:
    byte_level().hf.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("日本 <s>naïve")) == "日本 naïve"
    assert tokenizer.is_special(0)
    assert not tokenizer.is_special(5)


@pytest.mark.parametrize("files", [{}, {"tokenizer.json": "{bad"}, {"tokenizer.json": "{}"}])
def test_a_folder_without_a_tokenizer(tmp_path: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no model folder"):
        load_tokenizer(tmp_path / "nowhere")


def test_chat_templates(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_level()
    messages = [{"role": "user", "content": "the dog"}]
    assert not tokenizer.has_chat_template
    with pytest.raises(RequestError, match="no chat template") as caught:
        tokenizer.apply_chat_template(messages)
    assert caught.value.field == "messages"
    template = (
        "{% for m in messages %}{% if m.role != 'user' %}{{ raise_exception('only users') }}"
        "{% endif %}<s>{{ m.content + '' }}{% endfor %}"
        "{% if add_generation_prompt %}</s>{% endif %}"
    )
    monkeypatch.setattr(tokenizer.hf, "chat_template", template)
    assert tokenizer.has_chat_template
    ids = tokenizer.apply_chat_template(messages)
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s>the dog</s>"
    for bad in ([{"role": "robot", "content": "x"}], [{"role": "user", "content": None}], []):
        with pytest.raises(RequestError) as caught:
            tokenizer.apply_chat_template(bad)
        assert caught.value.field == "messages"


def test_text_that_is_not_unicode() -> None:
    with pytest.raises(RequestError, match="surrogate"):
        byte_level().encode("a\ud800")
