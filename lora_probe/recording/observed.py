"""The requests of an engine that nobody asked by `trace`: made of the tokens in its rows.

In: the rows of a trace whose engine kept tokens. Out: a `RequestRecord` for each request with the tokens of its prompt
and of its answer, up to the last one that was an input; no text and no log-probabilities.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lora_probe.recording.records import DECODE, RequestRecord
from lora_probe.recording.rows import Rows


def observed_requests(rows: Rows, adapters: Mapping[int, str]) -> tuple[RequestRecord, ...]:
    """`adapters` are the names by the number of a load. A request whose tokens are not all known is left out."""
    if rows.token is None:
        return ()
    requests = list[RequestRecord]()
    known = np.flatnonzero(rows.token >= 0)
    by_request = known[np.argsort(rows.request[known], kind="stable")]
    bounds = np.searchsorted(rows.request[by_request], np.arange(len(rows.requests) + 1))
    for number, name in enumerate(rows.requests):
        own = by_request[bounds[number] : bounds[number + 1]]
        if not len(own):
            continue
        # Of a row that was computed twice, the last one counts.
        tokens = dict(zip(rows.position[own].tolist(), rows.token[own].tolist(), strict=True))
        answered = {int(at) for at in rows.position[own[rows.phase[own] == DECODE]].tolist()}
        served = rows.served.get(name)
        prompt = list(served.prompt_ids) if served is not None and served.prompt_ids else None
        if prompt is None:
            length = min(answered, default=max(tokens) + 1)
            prompt = [tokens[at] for at in range(length) if at in tokens]
            if len(prompt) < length:
                continue
        answer = list[int]()
        while len(prompt) + len(answer) in answered:
            answer.append(tokens[len(prompt) + len(answer)])
        loads = set(rows.load[own].tolist())
        adapter = next((adapters[load] for load in sorted(loads, reverse=True) if load in adapters), None)
        requests.append(RequestRecord(name, len(requests), adapter, prompt, answer, ""))
    return tuple(requests)
