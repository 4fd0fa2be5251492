"""The server engine without a model: what the network and servers do wrong, and what is concluded from answers."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from answering import CARDS, Asked, Reply, answering, answers, completion, server
from conftest import call

from lora_probe import open_trace
from lora_probe.engines.server import client as client_module
from lora_probe.engines.server.client import Client, checked_url
from lora_probe.engines.server.engine import ServerEngine, served
from lora_probe.engines.server.verdict import Doubles, Passes, fitted, judged
from lora_probe.errors import EngineFailed, ProbeError
from lora_probe.recording import Outcome, Prompt, RunSpec, Trace
from lora_probe.recording.records import NextTokens

Body = Mapping[str, Any] | None
KEY = "sk-do-not-write-me-down"


def record(asked: Asked, folder: Path, *prompts: str, **options: object) -> Trace:
    """A run of the engine in this process."""
    settings = {"url": asked.url, "request_timeout": 5.0, **options}
    spec = RunSpec("server", None, "mine", "", [Prompt(text) for text in prompts or ("hello",)], 3, options=settings)
    ServerEngine().record(spec, folder)
    return open_trace(folder)


def outcome(trace: Trace) -> Outcome:
    return trace.outcomes[0]


def failure(reply: Callable[[Body, str], Reply], folder: Path, **options: object) -> EngineFailed:
    with answering(reply) as asked, pytest.raises(EngineFailed) as caught:
        record(asked, folder, **options)
    return caught.value


def test_an_adapter_that_changes_the_answers(tmp_path: Path) -> None:
    with answering(server) as asked:
        trace = record(asked, tmp_path / "run", "hello", "who are you")
    assert outcome(trace).outcome == "changes"
    assert trace.healthy
    assert (
        "changes the server's answers (largest change of a log-probability 0.50, noise 0.00" in outcome(trace).message
    )
    assert [(request.id, request.adapter, request.text) for request in trace.requests] == [
        ("base-0", None, "abc"),
        ("lora-0", "mine", "abc"),
        ("base-1", None, "abc"),
        ("lora-1", "mine", "abc"),
    ]
    of_first = [r for p in trace.processes for r in p.of(NextTokens) if r.request == "lora-0"]
    assert [(record.model, record.repetition) for record in of_first] == [
        ("base", 0),
        ("mine", 0),
        ("base", 1),
        ("mine", 1),
    ]
    assert len(of_first[0].logprobs) == len("helloabc")


def test_an_adapter_without_an_effect(tmp_path: Path) -> None:
    with answering(lambda body, path: server(body, path, shift=0.0)) as asked:
        trace = record(asked, tmp_path / "run")
    assert outcome(trace).code == "LP608"
    assert not trace.healthy


def test_a_change_that_is_within_the_noise_is_none(tmp_path: Path) -> None:
    count = iter(range(1000))

    def noisy(body: Body, path: str) -> Reply:
        return server(body, path, shift=0.0) if path == "/v1/models" else (200, answers(body or {}, 0.1 * next(count)))

    with answering(noisy) as asked:
        assert outcome(record(asked, tmp_path / "run")).outcome == "as base"


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (lambda body, path: (401, {"error": {"message": f"bad key {KEY}"}}), "refuses the key"),
        (lambda body, path: (404, {"detail": "Not Found"}), "does not have /v1/models"),
        (lambda body, path: (200, b"<html>"), "is not that of an OpenAI-compatible server"),
        (lambda body, path: (200, {"models": []}), "is not that of an OpenAI-compatible server"),
        (lambda body, path: (200, {"data": []}), "does not serve `mine`; it serves nothing"),
        (lambda body, path: (200, {"data": CARDS[:1]}), "does not serve `mine`; it serves `base`"),
        (lambda body, path: (308, b"", {"Location": "https://elsewhere/"}), "redirects to https://elsewhere/"),
        (lambda body, path: (500, {"error": {"message": f"boom {KEY}\n"}}), "with status 500: boom ***"),
        (lambda body, path: server(body, path) if body is None else (404, b""), "/v1/completions: is it chat-only?"),
        (lambda body, path: server(body, path) if body is None else (405, b""), "/v1/completions: is it chat-only?"),
        (lambda body, path: server(body, path) if body is None else (200, {"choices": []}), "returned no answer"),
        (
            lambda body, path: server(body, path) if body is None else (200, {"choices": [{"text": "hi"}]}),
            "returns no log-probabilities",
        ),
        (
            lambda body, path: server(body, path) if body is None else (200, completion(["a"], [-1.0])),
            "does not return log-probabilities of a prompt",
        ),
        (
            lambda body, path: server(body, path) if body is None else (400, {"error": {"message": "too long"}}),
            "answered POST /v1/completions with status 400: too long",
        ),
    ],
)
def test_what_servers_answer_instead(
    reply: Callable[[Body, str], Reply], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    error = failure(reply, tmp_path / "run")
    assert words in error.message
    assert KEY not in error.message + error.hint
    assert "\n" not in error.message


def test_log_probabilities_that_are_not_numbers(tmp_path: Path) -> None:
    def broken(body: Body, path: str) -> Reply:
        return server(body, path) if not (body or {}).get("echo") else (200, completion(list("abc"), [None, None, -1]))

    assert "are not numbers" in failure(broken, tmp_path / "run").message


def test_a_prompt_and_an_answer_without_tokens_to_compare(tmp_path: Path) -> None:
    def brief(body: Body, path: str) -> Reply:
        return (200, completion(["</s>"], [-1.0], "")) if body and not body.get("echo") else server(body, path)

    with answering(brief) as asked, pytest.raises(EngineFailed, match="no tokens to compare"):
        record(asked, tmp_path / "run", "h")


def test_too_many_requests_are_sent_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    busy = iter([(429, b"", {"Retry-After": "3"}), (503, b""), (429, b"", {"Retry-After": "9999"})])
    with answering(lambda body, path: next(busy, None) or server(body, path)) as asked:
        assert outcome(record(asked, tmp_path / "run")).outcome == "changes"
    assert waits == [3.0, 2.0, client_module.LONGEST_WAIT]
    error = failure(lambda body, path: (429, {"error": "slow down"}), tmp_path / "again")
    assert "limits requests (status 429): slow down" in error.message


def test_a_server_that_is_slow_or_not_there(tmp_path: Path) -> None:
    def slow(body: Body, path: str) -> Reply:
        if body is not None:
            time.sleep(0.6)
        return server(body, path)

    assert "within 0.2 seconds" in failure(slow, tmp_path / "run", request_timeout=0.2).message
    with pytest.raises(EngineFailed, match="cannot reach the server"):
        record(Asked("http://127.0.0.1:1"), tmp_path / "nobody")


def test_an_answer_without_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "MOST_BYTES", 1000)
    assert "more than 1000 bytes" in failure(lambda body, path: (200, b" " * 4000), tmp_path / "run").message


def test_the_key_is_sent_and_written_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with answering(server) as asked:
        record(asked, tmp_path / "run")
    assert {headers["Authorization"] for _, _, headers in asked.requests} == {f"Bearer {KEY}"}
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


@pytest.mark.parametrize("key", [f"{KEY}\n", f" {KEY} ", "sk-\u2026", "sk-\x07"])
def test_a_key_that_cannot_be_sent_is_not_printed(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with answering(server) as asked:
        if KEY in key:
            assert outcome(record(asked, tmp_path / "run")).outcome == "changes"
            return
        with pytest.raises(ProbeError, match="OPENAI_API_KEY") as caught:
            record(asked, tmp_path / "run")
    assert "sk-" not in str(caught.value)


def test_a_server_that_answers_byte_by_byte(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=_drip, args=(listening,), daemon=True).start()
        began = time.monotonic()
        with pytest.raises(EngineFailed, match="did not answer GET /v1/models within"):
            record(Asked(f"http://127.0.0.1:{listening.getsockname()[1]}"), tmp_path / "run", request_timeout=0.3)
        assert time.monotonic() - began < 2


def _drip(listening: socket.socket) -> None:
    connection, _ = listening.accept()
    with connection, suppress(OSError):
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        for _ in range(100):
            connection.sendall(b" ")
            time.sleep(0.1)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://", "", "http://[::", "file:///etc/passwd"])
def test_what_is_not_a_url(url: str) -> None:
    with pytest.raises(ProbeError, match="is not the URL of a server"):
        checked_url(url)


@pytest.mark.parametrize("url", [f"http://me:{KEY}@host", f"http://host/?key={KEY}"])
def test_a_url_with_a_secret_is_refused(url: str) -> None:
    with pytest.raises(ProbeError, match="password") as caught:
        checked_url(url)
    assert KEY not in str(caught.value)


def test_the_path_of_the_api_may_be_part_of_the_url() -> None:
    for url in ("http://host:8000", "http://host:8000/", "http://host:8000/v1", "http://host:8000/v1/"):
        assert checked_url(url) == "http://host:8000"
    assert checked_url("https://host/proxy/v1") == "https://host/proxy"


@pytest.mark.parametrize(
    ("cards", "passed", "expected"),
    [
        ([{"id": "base"}, {"id": "mine", "parent": "base"}], None, "base"),
        ([{"id": "base"}, {"id": "mine"}], None, "base"),
        ([{"id": "base"}, {"id": "mine", "parent": "its other name"}], None, "base"),
        ([{"id": "base"}, {"id": "alias"}, {"id": "mine", "parent": "base"}], None, "base"),
        ([{"id": "base"}, {"id": "alias"}, {"id": "mine"}], "alias", "alias"),
        ([{"id": "base"}, {"id": "alias"}, {"id": "mine"}], None, None),
        ([{"id": "mine"}], None, None),
        ([{"id": "base"}, {"id": "mine"}], "other", None),
    ],
)
def test_which_model_is_the_base(cards: list[dict[str, str]], passed: str | None, expected: str | None) -> None:
    with answering(lambda body, path: (200, {"data": cards})) as asked, Client(asked.url, 5) as client:
        if expected is None:
            why = "does not state which model" if passed is None else "does not serve `other`"
            with pytest.raises(EngineFailed, match=why):
                served(client, "mine", passed)
        else:
            assert served(client, "mine", passed)[1] == expected


# What is concluded: a linear model of an adapter, whose effect is its scaling times a direction.
NUMBERS = np.random.default_rng(1)
PLAIN = NUMBERS.normal(-3, 1, 200)
EFFECT = NUMBERS.normal(0, 0.3, 200)
BEND = NUMBERS.normal(0, 0.03, 200)


def in_peft(scaling: float) -> Doubles:
    return PLAIN + scaling * EFFECT + scaling**2 * BEND


def passes(base: Doubles, adapter: Doubles, noise: float = 0.0) -> Passes:
    def again(values: Doubles) -> Doubles:
        return values + NUMBERS.normal(0, noise, len(values)) if noise else values

    return Passes((base, again(base)), (adapter, again(adapter)))


def concluded(base: Doubles, adapter: Doubles, noise: float = 0.0) -> Outcome:
    return judged(0, "mine", "base", passes(base, adapter, noise), "/models/base", in_peft)


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_as_trained(noise: float) -> None:
    rounding = NUMBERS.normal(0, noise, len(PLAIN)) if noise else 0.0
    verdict = concluded(PLAIN + rounding, in_peft(1.0) - rounding, noise)
    assert (verdict.outcome, verdict.code) == ("as trained", "")
    assert verdict.factor == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("factor", [2.0, 0.5, 1.3, 4.0, 1 / 16, -1.0, 11.3, 0.8])
@pytest.mark.parametrize("noise", [0.0, 0.005])
def test_another_scaling(factor: float, noise: float) -> None:
    rounding = NUMBERS.normal(0, noise, len(PLAIN)) if noise else 0.0
    verdict = concluded(PLAIN + rounding, in_peft(factor) - rounding, noise)
    assert (verdict.outcome, verdict.code) == ("other scaling", "LP609")
    assert verdict.factor == pytest.approx(factor, rel=0.05)


@pytest.mark.parametrize("share", [0.05, 0.15, 0.25])
@pytest.mark.parametrize("factor", [0.1, 0.25, 0.5])
def test_a_weaker_adapter_is_not_as_trained_where_bases_differ(factor: float, share: float) -> None:
    """In another dtype, the base models differ by a part of what the adapter changes."""
    differ = NUMBERS.normal(0, share * 0.3, len(PLAIN))
    again = NUMBERS.normal(0, share * 0.1, len(PLAIN))
    verdict = concluded(PLAIN + differ, in_peft(factor) + differ + again)
    assert not verdict.sound
    healthy = concluded(PLAIN + differ, in_peft(1.0) + differ + again)
    assert healthy.outcome == "as trained"


def test_a_single_noisy_token_changes_no_verdict() -> None:
    noisy = in_peft(1.0)
    again = noisy.copy()
    again[7] += 3
    assert judged(0, "mine", "base", Passes((PLAIN, PLAIN), (noisy, again)), "m", in_peft).outcome == "as trained"


def test_numbers_of_peft_that_are_none() -> None:
    for broken in (0.0, 1.0):

        def with_nan(scaling: float, broken: float = broken) -> Doubles:
            return np.full_like(PLAIN, np.nan) if scaling == broken else in_peft(scaling)

        assert judged(0, "m", "b", passes(PLAIN, in_peft(1.0)), "m", with_nan).outcome == "undecided"


def test_scalings_of_an_adapter_with_whole_modules_are_not_fitted() -> None:
    of = passes(PLAIN, in_peft(2.0))
    assert judged(0, "mine", "base", of, "m", in_peft, scalable=False).code == "LP610"
    assert judged(0, "mine", "base", passes(PLAIN, in_peft(1.0)), "m", in_peft, scalable=False).outcome == "as trained"


def test_an_adapter_without_effect_and_a_server_that_changes() -> None:
    verdict = judged(0, "mine", "base", passes(PLAIN, in_peft(1.0)), "m", lambda _: PLAIN)
    assert verdict.code == "LP610"


def test_nothing_is_applied() -> None:
    assert concluded(PLAIN, PLAIN).code == "LP608"
    assert concluded(PLAIN, in_peft(0.001)).code == "LP608"


def test_other_weights_and_half_of_them() -> None:
    assert concluded(PLAIN, PLAIN + EFFECT[::-1]).code == "LP610"
    half = np.where(np.arange(len(PLAIN)) % 2 == 0, EFFECT, 0)
    assert concluded(PLAIN, PLAIN + half).code == "LP610"


def test_another_base() -> None:
    assert concluded(PLAIN[::-1], PLAIN[::-1] + EFFECT).code == "LP611"


def test_an_effect_that_is_smaller_than_the_difference_of_engines() -> None:
    far = PLAIN + NUMBERS.normal(0, 0.3, len(PLAIN))
    verdict = concluded(far, far + EFFECT)
    assert (verdict.outcome, verdict.sound) == ("undecided", False)
    assert "--prompt" in verdict.message


def test_a_fit_ends_where_nothing_depends_on_the_scaling() -> None:
    assert fitted(PLAIN, {0.0: PLAIN, 1.0: PLAIN}, lambda _: PLAIN) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--engine", "server"), "--engine server needs --url"),
        (("--engine", "server", "--url", "http://x"), "--engine server needs --adapter"),
        (("--engine", "peft", "--url", "http://x"), "--url needs --engine server, not peft"),
        (
            ("--engine", "server", "--url", "http://x", "--adapter", "a", "--max-loras", "2"),
            "--max-loras has no effect",
        ),
        (("--engine", "server", "--url", "http://x", "--adapter", "a", "--", "--foo"), "--foo has no effect"),
        (("--engine", "server", "--url", "http://x", "--adapter", "a", "--model", "m"), "--model needs the adapter's"),
        (("--engine", "server", "--url", "http://x", "--adapter", "a", "--chat"), "--chat needs the adapter's folder"),
        (("--engine", "server", "--url", "x", "--adapter", "a"), "`x` is not the URL of a server"),
    ],
)
def test_command_lines(arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = call("trace", *arguments, capsys=capsys)
    assert status == 2
    assert words in err
