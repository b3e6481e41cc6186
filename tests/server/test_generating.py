"""The real openai client against a real server: the same tokens as the engine alone, in OpenAI's shapes."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from .running import WORDS, serving

CHAT = [{"role": "user", "content": "the quick brown fox"}]


def chat(server, **options):
    options = {"model": "tiny", "messages": CHAT, "max_tokens": 12, "temperature": 0} | options
    return server.client.chat.completions.create(**options)


def complete(server, prompt, **options):
    options = {"model": "tiny", "prompt": prompt, "max_tokens": 12, "temperature": 0} | options
    return server.client.completions.create(**options)


def wanted(server, n: int = 12) -> str:
    return server.stock_text(server.encode_chat(CHAT[0]["content"]), n)


def test_a_chat_says_what_the_model_says_alone(server):
    reply = chat(server)
    assert reply.choices[0].message.content == wanted(server) and reply.choices[0].finish_reason == "length"
    prompt = server.encode_chat(CHAT[0]["content"])
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(prompt), 12)
    assert reply.usage.total_tokens == len(prompt) + 12
    details = reply.usage.prompt_tokens_details
    assert details.cached_tokens == details.device_tokens + details.host_tokens + details.disk_tokens
    ledger = dict(reply.usage.kvtier["ledger"])
    assert ledger.pop("ttft_s") == pytest.approx(sum(ledger.values())) == reply.usage.kvtier["ttft_s"]


def test_a_second_chat_finds_the_first_one_cached(server):
    long = [{"role": "user", "content": " ".join(WORDS * 8)}]
    chat(server, messages=long)
    details = chat(server, messages=long).usage.prompt_tokens_details
    assert details.cached_tokens >= 16 and details.cached_tokens == details.device_tokens + details.host_tokens


def test_a_stream_adds_up_to_the_whole_and_ends_with_usage(server):
    chunks = list(chat(server, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == wanted(server)
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].choices[0].finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == 12 and all(c.usage is None for c in chunks[:-1])
    chunks = list(chat(server, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == [] and chunks[-1].usage.prompt_tokens_details.cached_tokens is not None
    text = "".join(c.choices[0].text for c in complete(server, "the fox", stream=True))
    assert text == complete(server, "the fox").choices[0].text


def test_a_stream_ends_with_done_and_each_chunk_is_one_event(server):
    body = {"messages": CHAT, "max_tokens": 3, "stream": True}
    with server.http.stream("POST", "/v1/chat/completions", json=body) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in reply.iter_lines() if line]
    assert lines[-1] == "data: [DONE]" and all(json.loads(line[6:]) for line in lines[:-1])


def test_n_answers_differ_repeat_by_seed_and_share_one_prompt(server):
    options = dict(n=3, temperature=1.5, seed=7, messages=[{"role": "user", "content": " ".join(WORDS * 9)}])
    before = server.service.engine.pager.counters.get("computed_tokens")
    first = chat(server, **options)
    computed = server.service.engine.pager.counters.get("computed_tokens") - before
    assert first.usage.completion_tokens == 36 and computed <= first.usage.prompt_tokens + 36
    texts = [choice.message.content for choice in first.choices]
    assert len(set(texts)) == 3 and [choice.index for choice in first.choices] == [0, 1, 2]
    assert [choice.message.content for choice in chat(server, **options).choices] == texts
    assert [choice.message.content for choice in chat(server, **options | {"seed": 8}).choices] != texts
    streamed = ["", "", ""]
    for chunk in chat(server, stream=True, **options):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts


@pytest.mark.parametrize("cut", [{"top_p": 1e-6}, {"extra_body": {"top_k": 1}}, {"extra_body": {"min_p": 0.99999}}])
def test_a_cut_that_leaves_one_token_is_greedy(server, cut):
    assert chat(server, temperature=1.0, **cut).choices[0].message.content == wanted(server)


@pytest.mark.parametrize("is_streamed", [False, True])
def test_stop_texts_end_an_answer_and_are_not_part_of_it(server, is_streamed):
    whole = wanted(server, 40)
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]  # lies across tokens as often as not
    reply = chat(server, max_tokens=40, stop=[stop, "never said"], stream=is_streamed)
    if is_streamed:
        chunks = list(reply)
        text, reason = "".join(c.choices[0].delta.content or "" for c in chunks), chunks[-1].choices[0].finish_reason
    else:
        text, reason = reply.choices[0].message.content, reply.choices[0].finish_reason
    assert text == whole[: whole.index(stop)] and reason == "stop"


def test_the_models_own_end_is_a_stop_and_not_text(model, tokenizer):
    import copy

    import torch

    eager = copy.deepcopy(model)
    with torch.no_grad():
        eager.lm_head.weight[tokenizer.eos_token_id] = 3.0 * eager.lm_head.weight.abs().sum(0).sign()
    with serving(eager, tokenizer) as server:
        reply = chat(server, temperature=2.0, seed=1, max_tokens=300)
        assert reply.choices[0].finish_reason == "stop" and "</s>" not in reply.choices[0].message.content


def test_log_probabilities_in_both_formats(server):
    import torch

    prompt = server.encode_chat(CHAT[0]["content"])
    reply = chat(server, logprobs=True, top_logprobs=3)
    entries = reply.choices[0].logprobs.content
    assert len(entries) == 12 and all(len(entry.top_logprobs) == 3 for entry in entries)
    with torch.inference_mode():
        scores = server.model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    assert entries[0].logprob == pytest.approx(float(scores.max()), abs=1e-4)
    assert entries[0].top_logprobs[0].token == entries[0].token
    raw = bytes(byte for entry in entries for byte in entry.bytes)
    assert raw.decode(errors="ignore").startswith(reply.choices[0].message.content[:4].rstrip("\ufffd"))
    streamed = [e for c in chat(server, stream=True, logprobs=True, top_logprobs=3) for e in _logged(c)]
    assert [e.logprob for e in streamed] == pytest.approx([e.logprob for e in entries], abs=1e-4)
    old = complete(server, prompt, logprobs=2).choices[0].logprobs
    assert old.token_logprobs == pytest.approx([e.logprob for e in entries], abs=1e-4)
    assert all(len(best) == 2 for best in old.top_logprobs) and old.text_offset[0] == 0
    assert chat(server, logprobs=True, max_tokens=2).choices[0].logprobs.content[0].top_logprobs == []


def _logged(chunk):
    logprobs = chunk.choices[0].logprobs
    return logprobs.content if logprobs else []


def test_max_tokens_zero_warms_the_cache(server):
    messages = [{"role": "user", "content": " ".join(reversed(WORDS * 8))}]
    warm = chat(server, messages=messages, max_tokens=0)
    assert warm.choices[0].message.content == "" and warm.usage.completion_tokens == 0
    assert warm.usage.prompt_tokens_details.cached_tokens < 16 < warm.usage.prompt_tokens
    then = chat(server, messages=messages, max_completion_tokens=4)
    assert then.usage.prompt_tokens_details.cached_tokens > warm.usage.prompt_tokens - 32
    assert list(chat(server, messages=messages, max_tokens=0, stream=True))[-1].usage.completion_tokens == 0


def test_completions_take_texts_and_token_ids_one_or_several(server):
    ids = server.tokenizer("the lazy dog")["input_ids"]
    alone = server.stock_text(ids, 12)
    assert complete(server, "the lazy dog").choices[0].text == alone
    assert complete(server, ids).choices[0].text == alone
    both = complete(server, ["the lazy dog", "jumps"], n=2)
    assert [c.index for c in both.choices] == [0, 1, 2, 3]
    assert [c.text for c in both.choices[:2]] == [alone] * 2
    assert both.choices[2].text == complete(server, [server.tokenizer("jumps")["input_ids"]]).choices[0].text
    assert len(complete(server, "the", max_tokens=openai.omit).choices[0].text) > 0


def test_64_at_a_time_on_a_small_device_tier_say_what_each_says_alone(model, tokenizer):
    texts = [" ".join((WORDS * 6)[i % 9 : i % 9 + 6 + i % 13]) for i in range(64)]
    with serving(model, tokenizer, blocks=24, host=400) as server:
        wanted = [server.stock_text(server.encode_chat(text), 8) for text in texts]

        def ask(i: int) -> str:
            options = dict(messages=[{"role": "user", "content": texts[i]}], max_tokens=8)
            if i % 2:
                return chat(server, **options).choices[0].message.content
            return "".join(c.choices[0].delta.content or "" for c in chat(server, stream=True, **options))

        with ThreadPoolExecutor(64) as pool:
            answers = list(pool.map(ask, range(64)))
        assert [answer.rstrip("\ufffd") for answer in answers] == wanted


def test_closing_a_stream_ends_the_request(server):
    stream = chat(server, stream=True, max_tokens=3000)
    for _ in zip(range(3), stream):
        pass
    stream.close()
    server.check_end()  # within seconds, long before 3,000 tokens
    with pytest.raises(openai.APITimeoutError):
        server.client.with_options(timeout=0.3).chat.completions.create(
            model="tiny", messages=CHAT, max_tokens=3000, temperature=0
        )
    server.check_end()


def test_a_silent_stream_says_that_it_lives(model, tokenizer):
    with serving(model, tokenizer, blocks=300, keep_alive_s=0.01) as server:
        body = {"prompt": "the lazy dog " * 900, "max_tokens": 1, "stream": True}
        with server.http.stream("POST", "/v1/completions", json=body) as reply:
            lines = list(reply.iter_lines())
        assert lines.count(": keep-alive") >= 2 and lines.index(": keep-alive") < len(lines) - 4


def test_the_model_is_listed(server):
    (model,) = server.client.models.list().data
    assert model.id == "tiny" and server.client.models.retrieve("tiny").max_context == server.service.max_context


def test_fields_of_others_are_ignored_where_they_change_nothing(server):
    extra = {"user": "x", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "nonsense": [1], "tools": []}
    extra |= {"logit_bias": None, "frequency_penalty": 0, "response_format": {"type": "text"}, "tool_choice": "none"}
    assert chat(server, extra_body=extra).choices[0].message.content == wanted(server)


def test_a_chat_rendered_differently_says_where_reuse_broke(server):
    def ask(messages):
        return chat(server, messages=messages, prompt_cache_key="k", max_tokens=4).usage.kvtier.get("reuse_break_at")

    first = [{"role": "system", "content": "it is monday"}, *CHAT]
    assert ask(first) is None
    changed = [{"role": "system", "content": "it is friday"}, *CHAT]
    broken = ask(changed)
    assert broken["reason"] == "history_changed" and 0 < broken["at"] < 24 and "date" in broken["explanation"]
    assert ask(first)["reason"] == "history_changed"


def test_a_request_is_found_by_its_id_by_inspectors(server):
    from kvtier.pager.inspection.inspector import Inspector

    raw = server.client.chat.completions.with_raw_response.create(model="tiny", messages=CHAT, max_tokens=2)
    name = raw.headers["x-request-id"]
    (told,) = Inspector(server.service.engine.pager._core).answer({"verb": "why", "request": name})["requests"]
    assert told["name"] == name and sum(line["seconds"] for line in told["lines"]) == pytest.approx(told["ttft_s"])


def test_a_request_may_attend_to_a_part_and_is_told_what_it_read(server):
    long = [{"role": "user", "content": " ".join(WORDS * 8)}]
    some = chat(server, messages=long, extra_body={"attention": "window:16,sinks=2"})
    assert some.choices[0].message.content and "selection" not in some.usage.kvtier
    for wrong, said in (("window", "window >= 1"), ("select:8", "selection_bytes")):
        with pytest.raises(openai.BadRequestError, match=said):
            chat(server, messages=long, extra_body={"attention": wrong})
