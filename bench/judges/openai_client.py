"""The `openai` client against a running server: python openai_client.py http://127.0.0.1:8000 [KEY]

    pip install openai
"""

import sys

import openai


def main():
    url, key = sys.argv[1].rstrip("/"), (sys.argv + ["none"])[2]
    client = openai.OpenAI(base_url=url + "/v1", api_key=key, max_retries=0)
    names = [model.id for model in client.models.list()]
    model = names[0]
    print("models", names)

    whole = client.completions.create(model=model, prompt="pub fn", max_tokens=8, logprobs=2, seed=1)
    assert len(whole.choices[0].logprobs.tokens) == whole.usage.completion_tokens
    stream = client.completions.create(
        model=model, prompt="pub fn", max_tokens=8, seed=1, stream=True,
        stream_options={"include_usage": True})
    chunks = list(stream)
    text = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].text, (text, whole.choices[0].text)
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    print("completion, whole and streamed:", repr(text))

    ids = client.completions.create(
        model=model, prompt=[[1, 2, 3], [4, 5]], max_tokens=2, echo=True, logprobs=1, n=2,
        extra_body={"top_k": 5, "min_p": 0.01, "ignore_eos": True, "return_token_ids": True})
    assert len(ids.choices) == 4 and len(ids.choices[0].logprobs.token_logprobs) == 5
    shaped = client.completions.create(
        model=model, prompt="x", max_tokens=20, extra_body={"guided_regex": "[a-c]{3}-[0-9]{2}"})
    assert len(shaped.choices[0].text) == 6, shaped
    print("token ids, echo, n, regex:", repr(shaped.choices[0].text))

    messages = [{"role": "user", "content": "Say hello."}]
    try:
        chat = client.chat.completions.create(
            model=model, messages=messages, max_tokens=8, logprobs=True, top_logprobs=3, n=2)
        assert len(chat.choices) == 2 and chat.choices[0].logprobs.content[0].top_logprobs
        stream = client.chat.completions.create(
            model=model, messages=messages, max_tokens=8, seed=3, stream=True)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        whole = client.chat.completions.create(model=model, messages=messages, max_tokens=8, seed=3)
        assert whole.choices[0].message.content == text, (whole, text)
        print("chat, whole and streamed:", repr(text))
        tool = {"type": "function", "function": {"name": "f", "parameters": {
            "type": "object", "properties": {"x": {"type": "boolean"}}, "required": ["x"],
            "additionalProperties": False}}}
        try:
            called = client.chat.completions.create(
                model=model, messages=messages, tools=[tool], tool_choice="required", max_tokens=200)
            print("tool:", called.choices[0].finish_reason, called.choices[0].message.tool_calls)
        except openai.BadRequestError as error:
            assert "no place for tools" in str(error), error
            print("tool: the template takes none")
        shaped = client.chat.completions.create(
            model=model, messages=messages, max_tokens=100, response_format={
                "type": "json_schema", "json_schema": {"name": "s", "schema": {"enum": [1, 2]}}})
        assert shaped.choices[0].message.content in ("1", "2"), shaped
    except openai.BadRequestError as error:
        assert error.code == "no_chat_template", error
        print("chat: the model has no template, and says so")

    for name, wanted, call in [
        ("unknown model", openai.NotFoundError, dict(model="nobody", prompt="x")),
        ("temperature", openai.BadRequestError, dict(model=model, prompt="x", temperature=3)),
        ("token id", openai.BadRequestError, dict(model=model, prompt=[10**9])),
    ]:
        try:
            client.completions.create(**call)
        except wanted as error:
            print(f"{name}: {error.body['message']}")
        else:
            raise AssertionError(f"{name} was let pass")
    print("openai", openai.__version__, "is content")


if __name__ == "__main__":
    main()
