"""Tokenizer, health, version, usage, metrics, and the OpenAPI document."""

from __future__ import annotations

from .conftest import MakeServer
from .running import RunningServer


def test_tokenize_there_and_back(server: RunningServer) -> None:
    ids = server.http.post("/tokenize", json={"prompt": "sky: é", "add_special_tokens": False}).json()
    assert ids["tokens"] == list("sky: é".encode()) and ids["count"] == 7
    text = server.http.post("/detokenize", json={"model": "scripted", "tokens": ids["tokens"]}).json()
    assert text == {"prompt": "sky: é"}
    wrong = server.http.post("/detokenize", json={"tokens": [256]})
    assert wrong.status_code == 400 and wrong.json()["error"]["param"] == "tokens"


def test_health_and_version(server: RunningServer) -> None:
    for path in ("/health", "/health/live", "/health/ready"):
        assert server.http.get(path).json()["status"] == "ok"
    assert server.http.get("/version").json()["version"]


def test_request_ids_are_echoed_or_made(server: RunningServer) -> None:
    given = server.http.get("/health", headers={"X-Request-Id": "abc-1"})
    assert given.headers["x-request-id"] == "abc-1"
    assert int(given.headers["openai-processing-ms"]) >= 0
    made = server.http.get("/health", headers={"X-Request-Id": "a b"}).headers["x-request-id"]
    assert made.startswith("req-") and len(made) == 36


def test_metrics_have_the_fields_names_and_no_sessions(make_server: MakeServer) -> None:
    server = make_server()
    session_id = server.session()
    body = {"prompt": "sky:", "max_tokens": 6, "temperature": 0, "session_id": session_id}
    server.http.post("/v1/completions", json=body)
    text = server.http.get("/metrics").text
    assert session_id not in text
    label = '{model_name="scripted"}'
    for line in (
        f"mnemosyne:prompt_tokens_total{label} 4.0",
        f"mnemosyne:generation_tokens_total{label} 6.0",
        f"mnemosyne:time_to_first_token_seconds_count{label} 1.0",
        f"mnemosyne:inter_token_latency_seconds_count{label} 5.0",
        f"mnemosyne:e2e_request_latency_seconds_count{label} 1.0",
        f"mnemosyne:num_requests_running{label} 0.0",
        f"mnemosyne:num_requests_waiting{label} 0.0",
        'mnemosyne:request_success_total{finished_reason="length",model_name="scripted"} 1.0',
        'mnemosyne:engine_tokens_generated_total{device="cpu",model_name="scripted"} 6.0',
        'mnemosyne:engine_up{device="cpu",model_name="scripted"} 1.0',
    ):
        assert line in text, line
    for name in ("session_active", "unsaved_tokens", "ingest_tokens_total", "session_restore_total"):
        assert f"mnemosyne:{name}{{" in text, name


def test_the_document_names_each_operation_once_with_its_failures(server: RunningServer) -> None:
    document = server.http.get("/openapi.json").json()
    operations = [
        (path, method, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    ids = [operation["operationId"] for _, _, operation in operations]
    assert len(ids) == len(set(ids)) and "create_chat_completion" in ids
    for path, method, operation in operations:
        if path.startswith("/health"):
            continue
        assert {"400", "401", "413", "429", "500", "503"} <= set(operation["responses"]), (path, method)
        assert "HTTPValidationError" not in str(operation["responses"]), (path, method)
        assert "security" not in operation  # this server asks for no key
