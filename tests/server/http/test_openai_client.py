"""The unmodified ``openai`` client drives the server."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from .running import RunningServer


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_models(client: openai.OpenAI) -> None:
    [model] = client.models.list().data
    assert model.id == "scripted"
    assert client.models.retrieve("scripted").id == "scripted"
    assert model.model_dump()["root"].endswith("scripted") and model.model_dump()["max_model_len"] == 131_072


def test_completion(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="scripted", prompt="sky:", max_tokens=6, temperature=0)
    assert answer.choices[0].text == " blue\n"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (
        4,
        6,
        10,
    )
    assert answer.id.startswith("cmpl-") and answer.object == "text_completion"


@pytest.mark.parametrize("prompt", ["sky:", ["sky:"], [115, 107, 121, 58], [[115, 107, 121, 58]]])
def test_a_prompt_in_each_of_its_forms(client: openai.OpenAI, prompt: object) -> None:
    answer = client.completions.create(model="scripted", prompt=prompt, temperature=0, stop="\n")  # type: ignore[call-overload]
    assert [(c.index, c.text, c.finish_reason) for c in answer.choices] == [(0, " blue", "stop")]


def test_a_batch_with_choices_keeps_its_order(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="scripted", prompt=["a", "sky:", "~"], n=2, max_tokens=2, temperature=0
    )
    assert [c.text for c in answer.choices] == ["bl", "bl", " b", " b", "é", "é"]
    assert [c.index for c in answer.choices] == list(range(6))
    assert answer.usage is not None and answer.usage.prompt_tokens == 6  # a prompt counts once


def test_completion_logprobs(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="scripted", prompt="sky:", max_tokens=3, temperature=0, logprobs=2
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.top_logprobs is not None
    assert logprobs.tokens == [" ", "b", "l"]
    assert logprobs.text_offset == [0, 1, 2]
    assert all(value is not None and -0.01 < value <= 0 for value in logprobs.token_logprobs or [])
    assert all(token in top for token, top in zip(logprobs.tokens, logprobs.top_logprobs, strict=True))


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="scripted",
        messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Sky?"}],
        temperature=0,
    )
    assert answer.choices[0].message.content == "blue"  # the template's space isn't content
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None and answer.usage.prompt_tokens == len("Be brief.\nQ: Sky?\nA:")


def test_chat_content_as_parts_and_a_conversation_without_a_session(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="scripted",
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "Sk"}, {"type": "text", "text": "y?"}]},
            {"role": "assistant", "content": "blue"},
            {"role": "user", "content": "Sea?"},
        ],
        max_completion_tokens=3,
        temperature=0,
    )
    assert answer.choices[0].message.content == "bl" and answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len("Q: Sky?\nA: blue\nQ: Sea?\nA:")


def test_chat_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="scripted",
        messages=[{"role": "user", "content": "Sky?"}],
        logprobs=True,
        top_logprobs=2,
        temperature=0,
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert "".join(item.token for item in logprobs.content).startswith(" blue")
    assert logprobs.content[0].bytes == [32] and len(logprobs.content[0].top_logprobs) == 2


def test_chat_stream(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="scripted",
        messages=[{"role": "user", "content": "Sky?"}],
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "blue"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert chunks[-1].usage.prompt_tokens == len("Q: Sky?\nA:")


def test_completion_stream_with_choices(client: openai.OpenAI) -> None:
    texts = ["", ""]
    for chunk in client.completions.create(
        model="scripted", prompt="~", n=2, max_tokens=3, temperature=0, stream=True
    ):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == ["é\n", "é\n"]  # a character of two tokens is never cut


def test_ignore_eos_goes_on_past_the_templates_stop(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="scripted",
        messages=[{"role": "user", "content": "Sky?"}],
        max_completion_tokens=8,
        temperature=0,
        extra_body={"ignore_eos": True},
    )
    assert answer.choices[0].message.content == "blue\nxx"


def test_sampling_fields_reach_the_engine(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="scripted",
        prompt="sky:",
        max_tokens=1,
        temperature=0.5,
        top_p=0.9,
        seed=-1,
        presence_penalty=0.5,
        frequency_penalty=0.5,
        logit_bias={"90": 100},
        user="me",
        extra_body={"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1},
    )
    assert answer.choices[0].text == "Z"  # logit_bias decided


def test_session_turns(client: openai.OpenAI, server: RunningServer) -> None:
    session_id = server.session()
    first = client.chat.completions.with_raw_response.create(
        model="scripted",
        messages=[{"role": "user", "content": "Sky?"}],
        temperature=0,
        extra_body={"session_id": session_id},
    )
    report = first.parse().model_dump()["session"]
    assert first.parse().choices[0].message.content == "blue"
    assert report["id"] == session_id and first.headers["X-Session-ID"] == session_id
    assert first.headers["ETag"] == f'"{report["version"]}"'
    assert report["tokens_seen"] == len("Q: Sky?\nA: blue\n")

    second = client.chat.completions.create(
        model="scripted",
        messages=[{"role": "user", "content": "Sea?"}],
        temperature=0,
        extra_headers={"X-Session-ID": session_id},
        stream=True,
    )
    [ending] = [c.model_dump() for c in second if c.choices[0].finish_reason]
    assert ending["session"]["version"] > report["version"]
    assert ending["session"]["tokens_seen"] == 2 * report["tokens_seen"]


def test_a_turn_that_does_not_learn_leaves_no_trace(client: openai.OpenAI, server: RunningServer) -> None:
    session_id = server.session()
    before = server.http.get(f"/v1/sessions/{session_id}").json()
    answers = client.completions.create(
        model="scripted",
        prompt="sky:",
        n=3,
        temperature=0,
        stop=["\n"],
        extra_body={"session_id": session_id, "learn": False},
    )
    assert [c.text for c in answers.choices] == [" blue"] * 3
    after = server.http.get(f"/v1/sessions/{session_id}").json()
    assert (after["version"], after["tokens_seen"]) == (before["version"], before["tokens_seen"])


def test_a_resent_history_is_refused_or_recognised(client: openai.OpenAI, server: RunningServer) -> None:
    session_id = server.session()
    history = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Sky?"}]

    def ask(**extra: object) -> tuple[str, dict[str, object], openai.types.CompletionUsage]:
        answer = client.chat.completions.create(
            model="scripted",
            messages=history,  # type: ignore[arg-type]
            temperature=0,
            extra_body={"session_id": session_id, **extra},
        )
        assert answer.usage is not None
        return answer.choices[0].message.content or "", answer.model_dump()["session"], answer.usage

    text, before, _ = ask(history="auto")
    history += [{"role": "assistant", "content": text}, {"role": "user", "content": "Sea?"}]
    with pytest.raises(openai.BadRequestError) as refused:
        ask()
    assert refused.value.code == "history_resent" and refused.value.param == "messages"

    _, after, usage = ask(history="auto")
    assert after["tokens_seen"] == before["tokens_seen"] + len("Q: Sea?\nA: blue\n")  # type: ignore[operator]
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == len("Be brief.\nQ: Sky?\nA: blue\n")
    assert usage.prompt_tokens == usage.prompt_tokens_details.cached_tokens + len("Q: Sea?\nA:")

    history[2]["content"] = "green"
    with pytest.raises(openai.BadRequestError) as refused:
        ask(history="auto")
    assert refused.value.code == "history_mismatch"


def test_failures_have_the_clients_own_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="other", prompt="a")
    assert missing.value.code == "model_not_found" and missing.value.param == "model"
    with pytest.raises(openai.BadRequestError) as tools:
        client.chat.completions.create(
            model="scripted",
            messages=[{"role": "user", "content": "a"}],
            tools=[{"type": "function", "function": {"name": "f"}}],
        )
    assert tools.value.param == "tools"
