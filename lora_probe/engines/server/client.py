"""HTTP requests to an OpenAI-compatible server.

In: its URL, and the key in OPENAI_API_KEY, which is written nowhere. Out: the models that it serves, answers, and
log-probabilities of given tokens. Whatever the server or the network does wrong is one `EngineFailed`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import httpx
import msgspec

from lora_probe.errors import EngineFailed, ProbeError
from lora_probe.files import shown

KEY = "OPENAI_API_KEY"
MOST_BYTES = 64_000_000
"""Bytes of an answer. Log-probabilities of 30,000 tokens take about 5 MB."""
ATTEMPTS, LONGEST_WAIT = 4, 20.0
"""How often a request is sent while the server answers that there are too many; and the seconds between two of them."""

Prompt = str | list[int]
TokenId = Annotated[int, msgspec.Meta(ge=0)]
T = TypeVar("T")


class Card(msgspec.Struct, frozen=True):
    """A model in /v1/models. vLLM states the base of an adapter in `parent`, and its path in `root`."""

    id: str
    root: str | None = None
    parent: str | None = None
    owned_by: str | None = None


class _Models(msgspec.Struct, frozen=True):
    data: list[Card]


class _Logprobs(msgspec.Struct, frozen=True):
    tokens: list[str]
    token_logprobs: list[float | None]


class _Choice(msgspec.Struct, frozen=True):
    text: str
    logprobs: _Logprobs | None = None
    token_ids: list[TokenId] | None = None
    prompt_token_ids: list[TokenId] | None = None


class _Completion(msgspec.Struct, frozen=True):
    choices: list[_Choice]


class _Message(msgspec.Struct, frozen=True):
    message: str


class _Refusal(msgspec.Struct, frozen=True):
    error: _Message | str | None = None
    message: str | None = None
    detail: Any = None


@dataclass(frozen=True)
class Answer:
    """A generated answer. Ids are empty if the server does not return them; `logprobs` are those of its tokens."""

    text: str
    tokens: tuple[str, ...]
    logprobs: tuple[float | None, ...]
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]


@dataclass(frozen=True)
class TokenScores:
    """The log-probability of each token of a given text, None for the first, which nothing predicts."""

    tokens: tuple[str, ...]
    logprobs: tuple[float | None, ...]


def checked_url(url: str) -> str:
    """The URL of a server without a path that the API itself adds.

    Raises:
        ProbeError: it is not one, or contains a password or a query: a trace contains the URL.
    """
    example = "for example: --url http://localhost:8000"
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, TypeError) as error:
        raise ProbeError(f"`{shown(url)}` is not the URL of a server: {error}", example) from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ProbeError(f"`{shown(url)}` is not the URL of a server", example)
    if parsed.userinfo or parsed.query or parsed.fragment:
        raise ProbeError("the URL of a server must not contain a password or a query", f"pass a key in {KEY}")
    return str(parsed).rstrip("/").removesuffix("/v1")


class Client:
    """One server, until the `with` block ends. `timeout`: seconds until an answer must be there."""

    def __init__(self, url: str, timeout: float) -> None:
        self.url, self._timeout = url, timeout
        self._key = os.environ.get(KEY, "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise ProbeError(f"the key in {KEY} has characters that a request cannot carry", "set it again")
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._http = httpx.Client(timeout=timeout, headers=headers)
        self._returns_ids = False

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def models(self) -> list[Card]:
        """What the server serves."""
        cards = self._decoded(self._request("GET", "/v1/models"), _Models, "/v1/models").data
        # A field of vLLM's own, which other servers may refuse.
        self._returns_ids = any(card.owned_by == "vllm" for card in cards)
        return cards

    def generate(self, model: str, prompt: Prompt, max_tokens: int) -> Answer:
        """The greedy answer of `model`."""
        more = {"return_token_ids": True} if self._returns_ids else {}
        choice = self._complete({"model": model, "prompt": prompt, "max_tokens": max_tokens, "logprobs": 1, **more})
        logprobs = self._logprobs(choice)
        return Answer(
            choice.text,
            tuple(logprobs.tokens),
            tuple(logprobs.token_logprobs),
            tuple(choice.prompt_token_ids or ()),
            tuple(choice.token_ids or ()),
        )

    def score(self, model: str, prompt: Prompt) -> TokenScores:
        """The log-probability of every token of `prompt`.

        Raises:
            EngineFailed: the server does not return those of a prompt.
        """
        asked = {"model": model, "prompt": prompt, "max_tokens": 1, "logprobs": 1, "echo": True}
        logprobs = self._logprobs(self._complete(asked))
        # The last token is a generated one.
        tokens, values = logprobs.tokens[:-1], logprobs.token_logprobs[:-1]
        if not tokens or (isinstance(prompt, list) and len(tokens) != len(prompt)):
            raise EngineFailed(
                f"the server at {self.url} does not return log-probabilities of a prompt (`echo`)",
                "vLLM and SGLang do; without them lora-probe cannot compare the same tokens",
            )
        return TokenScores(tuple(tokens), tuple(values))

    def _complete(self, body: Mapping[str, Any]) -> _Choice:
        path = "/v1/completions"
        data = self._request("POST", path, dict(body) | {"temperature": 0})
        choices = self._decoded(data, _Completion, path).choices
        if not choices:
            raise EngineFailed(f"the server at {self.url} returned no answer to POST {path}")
        return choices[0]

    def _logprobs(self, choice: _Choice) -> _Logprobs:
        logprobs = choice.logprobs
        if logprobs is None or len(logprobs.tokens) != len(logprobs.token_logprobs) or not logprobs.tokens:
            raise EngineFailed(
                f"the server at {self.url} returns no log-probabilities",
                "start it so that it does (vLLM: --max-logprobs 20); answers alone do not tell how much an adapter "
                "changes",
            )
        return logprobs

    def _decoded(self, data: bytes, kind: type[T], path: str) -> T:
        try:
            return msgspec.json.decode(data, type=kind)
        except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
            raise EngineFailed(
                f"{self.url}{path} is not that of an OpenAI-compatible server: {shown(str(error), 200)}",
                "check --url",
            ) from error

    def _request(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> bytes:
        """The body of an answer with status 200."""
        for attempt in range(1, ATTEMPTS + 1):
            status, headers, data = self._sent(method, path, body)
            if status == 200:
                return data
            if status not in (429, 503) or attempt == ATTEMPTS:
                break
            time.sleep(min(_seconds(headers.get("retry-after")) or 2.0**attempt / 2, LONGEST_WAIT))
        raise self._refused(method, path, status, headers, data)

    def _sent(self, method: str, path: str, body: Mapping[str, Any] | None) -> tuple[int, httpx.Headers, bytes]:
        deadline = time.monotonic() + self._timeout
        try:
            with self._http.stream(method, self.url + path, json=body) as response:
                data = b""
                for part in response.iter_bytes():
                    data += part
                    # The timeout of the library is one for each part.
                    if time.monotonic() > deadline:
                        raise httpx.ReadTimeout("")
                    if len(data) > MOST_BYTES:
                        raise EngineFailed(f"{self.url}{path} returned more than {MOST_BYTES} bytes")
                return response.status_code, response.headers, data
        except httpx.TimeoutException as error:
            raise EngineFailed(
                f"the server at {self.url} did not answer {method} {path} within {self._timeout:g} seconds",
                "wait longer with --request-timeout, or pass a smaller --max-tokens",
            ) from error
        # UnicodeError: the name of a host that no name server can be asked for.
        except (httpx.HTTPError, UnicodeError) as error:
            raise EngineFailed(
                f"cannot reach the server at {self.url}: {self._masked(str(error) or type(error).__name__, 200)}",
                "is it running, and is this its address?",
            ) from error

    def _refused(self, method: str, path: str, status: int, headers: httpx.Headers, data: bytes) -> EngineFailed:
        """The error for a status other than 200."""
        told = f": {said}" if (said := self._said(data)) else ""
        if status in (401, 403):
            how = "refuses the key" if self._key else "asks for a key"
            return EngineFailed(f"the server at {self.url} {how} (status {status})", f"set {KEY} to the server's key")
        if status == 405 or (status == 404 and "model" not in told.lower()):
            what = "/v1/models: is it OpenAI-compatible?" if path == "/v1/models" else f"{path}: is it chat-only?"
            hint = (
                "check --url"
                if path == "/v1/models"
                else "lora-probe compares the log-probabilities of given tokens, which chat completions do not return"
            )
            return EngineFailed(f"the server at {self.url} does not have {what}", hint)
        if status == 429:
            return EngineFailed(
                f"the server at {self.url} limits requests (status 429){told}", "try again later, or with fewer prompts"
            )
        if 300 <= status < 400:
            where = shown(headers.get("location", "another address"), 200)
            return EngineFailed(f"the server at {self.url} redirects to {where}", "pass that address with --url")
        return EngineFailed(f"the server at {self.url} answered {method} {path} with status {status}{told}")

    def _said(self, data: bytes) -> str:
        """The server's own message; never with the key, which some servers repeat."""
        try:
            refusal = msgspec.json.decode(data, type=_Refusal)
        except (msgspec.DecodeError, UnicodeError, RecursionError):
            return ""
        error = refusal.error
        text = error.message if isinstance(error, _Message) else error or refusal.message or ""
        return self._masked(text, 300)

    def _masked(self, text: str, longest: int) -> str:
        return shown(text.replace(self._key, "***") if self._key else text, longest)


def _seconds(value: str | None) -> float | None:
    return float(value) if value is not None and value.isdecimal() else None
