"""Answers that end with a token which is not the tokenizer's EOS: said once, whoever continues the chat."""

from __future__ import annotations

import io

import pytest
import torch
import transformers as T
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from kvtier import Engine, PagerConfig, SamplingParams
from kvtier.engine.template import end_tokens
from kvtier.tools import cli

from ..tools.test_chat import TEXT, small_model

END = "<|end|>"
PLAIN = "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}<|end|>\n{% endfor %}"
SPACED = PLAIN.replace("<|end|>", " <|end|>")
ASK = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
WARM = SamplingParams(max_tokens=0)


def make_tokenizer(*, template: str = PLAIN, is_special: bool = True, rstrip: bool = False):
    """END has the token id 0."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = [END, "<s>", "</s>", "<|user|>", "<|assistant|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    )
    raw.add_tokens([AddedToken(END, special=is_special, rstrip=rstrip, normalized=False)])
    tokenizer = T.PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    tokenizer.add_tokens(
        [AddedToken(END, special=is_special, rstrip=rstrip, normalized=False)], special_tokens=is_special
    )
    tokenizer.chat_template = template + ASK
    assert tokenizer.convert_tokens_to_ids(END) == 0
    return tokenizer


def model_that_only_ends(tokenizer, ends: int | list[int] | None):
    """All logits are equal, so the first token is the best one: END."""
    model = small_model("llama", tokenizer)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.generation_config.eos_token_id = ends
    return model


def engine_of(model, tokenizer) -> Engine:
    return Engine.from_model(model, PagerConfig(1 << 20, 1 << 20, backend="cpu", staging_bytes=0), tokenizer)


def whole_chat(tokenizer, *texts: str) -> list[int]:
    roles = ["user", "assistant"]
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("rstrip", [False, True], ids=["", "rstrip"])
@pytest.mark.parametrize(
    ("is_special", "ends"), [(True, None), (True, 0), (False, [2, 0])], ids=["special", "both", "named"]
)
def test_a_sessions_turns_add_up_to_the_whole_template(is_special, ends, rstrip):
    tokenizer = make_tokenizer(is_special=is_special, rstrip=rstrip)
    wanted = whole_chat(tokenizer, "hello", "the fox", "more", "a dog", "go on")
    with engine_of(model_that_only_ends(tokenizer, ends), tokenizer) as engine:
        for ending in ([], [0]):  # cut by length, or ended by the model itself
            session = engine.session(f"s{len(ending)}")
            for text, answer in [("hello", "the fox"), ("more", "a dog")]:
                said = [*session.encode(text), *tokenizer(answer)["input_ids"], *ending]
                session.send(said, WARM)
            assert [*session.token_ids, *session.encode("go on")] == wanted


def test_generated_turns_add_up_too():
    tokenizer = make_tokenizer()
    model = model_that_only_ends(tokenizer, [2, 0])
    with engine_of(model, tokenizer) as engine:
        session, params = engine.session("s"), SamplingParams(max_tokens=5, stop_token_ids=end_tokens(model, tokenizer))
        for text in ("hello", "more"):
            out = session.send(text, params)
            assert out.token_ids == [0] and out.finish_reason == "stop"
        assert [*session.token_ids, *session.encode("go on")] == whole_chat(tokenizer, "hello", "", "more", "", "go on")


def test_the_end_is_said_once_also_where_the_template_puts_a_space_before_it():
    tokenizer = make_tokenizer(template=SPACED)
    with engine_of(model_that_only_ends(tokenizer, 0), tokenizer) as engine:
        session = engine.session("s")
        session.send([*session.encode("hello"), *tokenizer("fox")["input_ids"], 0], WARM)
        assert tokenizer.decode(session.encode("more")) == "\n<|user|>more <|end|>\n<|assistant|>"


def test_a_last_token_that_ends_nothing_stays_the_answers_own():
    tokenizer = make_tokenizer(template=PLAIN.replace("<|end|>", ""))
    newline = tokenizer("\n")["input_ids"]
    with engine_of(model_that_only_ends(tokenizer, 0), tokenizer) as engine:
        session = engine.session("s")
        session.send([*session.encode("hello"), *newline], WARM)
        assert tokenizer.decode(session.encode("more")) == "\n<|user|>more\n<|assistant|>"


@pytest.mark.parametrize(
    ("named", "wanted"),
    [(None, (2,)), (0, (0, 2)), ([7, 0], (0, 2, 7)), (2, (2,))],
    ids=["none", "one", "list", "same"],
)
def test_what_ends_an_answer(named, wanted):
    tokenizer = make_tokenizer()
    assert end_tokens(model_that_only_ends(tokenizer, named), tokenizer) == wanted


@pytest.mark.parametrize("is_special", [True, False], ids=["special", "named"])
def test_kvtier_chat_stops_where_the_server_does(is_special, tmp_path, monkeypatch, capsys):
    tokenizer = make_tokenizer(is_special=is_special)
    model_that_only_ends(tokenizer, [2, 0]).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nmore\n"))
    assert cli.main(["chat", "--model", str(tmp_path), "--max-tokens", "5", "--store", str(tmp_path / "store")]) == 0
    out, told = capsys.readouterr()
    assert told.count("; 1 new; ") == 2 and out == "\n\n", (out, told)
