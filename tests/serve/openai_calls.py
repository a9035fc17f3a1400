"""Calls of the HTTP API and what is read from their answers."""

import json

from gcompute.config.serve import ServeConfig

LOCAL = ServeConfig(port=0, precision="bfloat16")
GREEDY = {"max_tokens": 12, "temperature": 0, "ignore_eos": True}
CHATML = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'developer' %}{{ raise_exception('no developers') }}{% endif %}"
    "[{{ m.role }}]{{ m.content | trim }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def complete(http, **body):
    response = http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def chunks_of(text: str) -> list:
    lines = [line for line in text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    data = [line.removeprefix("data: ") for line in lines]
    return [chunk if chunk == "[DONE]" else json.loads(chunk) for chunk in data]


def stream(http, **body):
    response = http.post("/v1/completions", json={**body, "stream": True})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    return chunks_of(response.text)


def counts(usage: dict) -> dict:
    """A usage without what the prefix cache had of it, which depends on the calls before."""
    assert set(usage.pop("prompt_tokens_details")) == {"cached_tokens"}
    return usage


def error_of(response, status, *, param=None, code=None) -> str:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    assert (body["error"]["param"], body["error"]["code"]) == (param, code)
    assert "\n" not in body["error"]["message"]
    return body["error"]["message"]


def metric(http, name: str) -> float:
    lines = http.get("/metrics").text.splitlines()
    return float(next(line.split()[-1] for line in lines if line.startswith(f"{name} ")))
