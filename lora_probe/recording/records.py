"""The recording format, schema 1: the records in a folder `RUN.lptrace`.

`writer.py` writes them and `reader.py` reads them; the columns of rows are in `rows.py`.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import msgspec

from lora_probe.ledger import Station, Value
from lora_probe.names import Key

SCHEMA = 1
REPLICA_LOADS = 1_000_000
"""Numbers of loads that one engine has to itself."""
PREFILL, DECODE = 0, 1

Level = Literal["events", "norms", "shrink", "tensors"]
LEVELS: tuple[Level, ...] = get_args(Level)
ScoreKind = Literal["adapter", "base", "plain"]


class Prompt(msgspec.Struct, frozen=True):
    """One prompt as text, and as the token ids that the engines see."""

    text: str
    ids: list[int] = []


class NamedAdapter(msgspec.Struct, frozen=True):
    """An adapter of a run: its name in the engine, and its folder."""

    name: str
    path: str


class RunSpec(msgspec.Struct, frozen=True):
    """What to run. `options` are engine options by vLLM's names. `continuation` contains the forced first ids of each
    answer; `max_tokens` counts the tokens after them.

    With `score`, every answer runs again in one pass, with and without the adapter, and the next-token distributions of
    its tokens are kept. A plain run (`adapter` None) only scores `model`: then `continuation` contains whole answers,
    and `watch` the paths of the modules whose outputs are recorded.

    `beside` are more adapters: each prompt runs in one batch, once for the base and for each adapter. With `together`
    all adapters are active at once instead.
    """

    engine: str
    adapter: str | None
    name: str
    model: str
    prompts: list[Prompt]
    max_tokens: int
    keep: Level = "shrink"
    options: dict[str, Any] = {}
    engine_args: list[str] = []
    chat: bool = False
    continuation: list[list[int]] | None = None
    score: bool = False
    watch: list[str] = []
    beside: list[NamedAdapter] = []
    together: bool = False


class Run(msgspec.Struct, frozen=True):
    """run.json: the request, written by the process that started the run."""

    schema: int
    created: str
    spec: RunSpec
    versions: dict[str, str]


class Process(msgspec.Struct, frozen=True):
    """process.json: the process that wrote this folder. `changed` lists the engine settings that recording changed.

    `host` and `began` tell whether it still runs (`alive.py`). `segments` and `scores` count what it has written so
    far; of these `dropped_segments` with `dropped_rows` were removed again to keep a bound, and `lost_rows` could not
    be written. `dropped_events` of the load timeline were left out for the same bound, and
    `lost_records` of events.jsonl could not be written either. `control` is the last request in control.json that the
    process has answered. `replica` is the number of the engine among those that serve the same model (data
    parallelism); the loads of replica n are numbered from n times REPLICA_LOADS on. `launch` is the same in all
    processes of one start of an engine.
    """

    schema: int
    role: str
    engine: str
    rank: int
    pid: int
    versions: dict[str, str]
    keep: str = "shrink"
    device: str = "cpu"
    dtype: str = ""
    lora_dtype: str = ""
    settings: dict[str, Any] = {}
    changed: list[str] = []
    not_recorded: str | None = None
    segments: int = 0
    scores: int = 0
    closed: bool = False
    host: str = ""
    began: str = ""
    dropped_segments: int = 0
    dropped_rows: int = 0
    dropped_events: int = 0
    lost_rows: int = 0
    lost_records: int = 0
    control: str = ""
    replica: int = 0
    launch: str = ""


class LoadEvent(msgspec.Struct, frozen=True, tag="event", tag_field="kind"):
    """One step of the load timeline. `at`: seconds since recording began; `seconds`: how long the step took."""

    at: float
    stage: str
    text: str
    module: str = ""
    seconds: float | None = None
    facts: dict[str, Any] = {}


class Load(msgspec.Struct, frozen=True, tag="load", tag_field="kind"):
    """One load of an adapter; each load has a ledger. A later line with the same number replaces the earlier one.

    `said` contains the lines that the engine logged during the load. `path` is `pushed as tensors` for an adapter
    without files. `generation` counts the contents under one `engine_id`; `reloads` counts how often the engine read
    unchanged content again because requests have `load_inplace`. `modules` is the number of its module records (None
    in older traces): a trace with fewer was cut.
    """

    load: int
    name: str
    path: str
    digest: str
    engine_id: int | None = None
    generation: int = 0
    slot: int | None = None
    refused: bool = False
    message: str = ""
    said: list[str] = []
    modules: int | None = None
    reloads: int = 0


class Shard(msgspec.Struct, frozen=True):
    """What a tensor-parallel rank holds of a module: part `part` of `parts`, along the module's input or output, or A
    along the input and B along the output. Ranks may hold the same part: several share the heads of k and v if there
    are fewer heads than ranks."""

    axis: Literal["input", "output", "both"]
    part: int
    parts: int


class ModuleRecord(msgspec.Struct, frozen=True, tag="module", tag_field="kind"):
    """One row of a load's ledger before its stations: names, shapes and the strength of its ΔW. `dtype` is the coarser
    one of A and B in the file, as safetensors spell it. `shard` is None if the process has the whole module."""

    load: int
    module: str
    parameter: str
    expert: int | None
    expected_by: list[str]
    stored_as: str | None = None
    engine_as: str | None = None
    rank: int | None = None
    scaling: float | None = None
    norm: float | None = None
    effective_rank: float | None = None
    dtype: str = ""
    shard: Shard | None = None

    @property
    def key(self) -> Key:
        return self.module, self.parameter, self.expert


class StationRecord(msgspec.Struct, frozen=True, tag="station", tag_field="kind"):
    """The finding of one station for some modules of a load. Of several records the worst counts."""

    load: int
    station: Station
    value: Value
    keys: list[Key]
    code: str = ""
    message: str = ""


class RequestFinding(msgspec.Struct, frozen=True, tag="requests", tag_field="kind"):
    """What went wrong for requests and not for modules: `rows` rows of `requests` and `more` other requests, under one
    rule. The load is the one whose weights, slot or name is involved. The last line of a load and a rule counts."""

    load: int
    code: str
    message: str
    rows: int
    requests: list[str]
    more: int = 0


class NextTokens(msgspec.Struct, frozen=True, tag="next_tokens", tag_field="kind"):
    """The log-probability of each token of a request's prompt and answer, given the tokens before it; None for the
    first. `model` is the name in the server, or `peft`, and `scaling` that of the adapter in PEFT, relative to the
    trained one. `repetition` counts passes over the same tokens."""

    request: str
    model: str
    logprobs: list[float | None]
    repetition: int = 0
    scaling: float | None = None


OutcomeKind = Literal["changes", "as base", "as trained", "other scaling", "other weights", "other base", "undecided"]


class Outcome(msgspec.Struct, frozen=True, tag="outcome", tag_field="kind"):
    """What the answers of a server show of a load whose layers cannot be seen. `code` is the rule, empty if nothing is
    wrong. Of the log-probabilities of `tokens` tokens, `change` is the largest difference between adapter and base, and
    `noise` between two passes over the same tokens.

    If PEFT ran the same tokens: `effect` is the root mean square of what the adapter changes there, `base_error` that
    of the difference between both base models, and `error` that between both adapters, in PEFT at `factor` times the
    trained scaling.
    """

    load: int
    outcome: OutcomeKind
    code: str
    message: str
    tokens: int
    change: float
    noise: float
    factor: float | None = None
    error: float | None = None
    effect: float | None = None
    base_error: float | None = None

    @property
    def sound(self) -> bool:
        """Whether the adapter has an effect, and the one that was trained if that is known."""
        return self.outcome in ("changes", "as trained")


class WeightsRecord(msgspec.Struct, frozen=True, tag="weights", tag_field="kind"):
    """The weights of a load at some modules: for each of `keys` a fingerprint of s·B·A and one of A, float32
    (`fingerprint.py`). They are the live ones, when its slots were filled, or those of the file; then `others` are the
    digests of all tensors that no fingerprint covers, by their names."""

    load: int
    keys: list[Key]
    fingerprints: bytes
    of_a: bytes
    in_file: bool = False
    others: dict[str, str] = {}


Record = LoadEvent | Load | ModuleRecord | StationRecord | RequestFinding | NextTokens | Outcome | WeightsRecord
KINDS = frozenset(str(kind.__struct_config__.tag) for kind in get_args(Record))
"""The kinds of records that this version knows. Readers skip lines of other kinds."""


class Served(msgspec.Struct, frozen=True):
    """How an engine served a request: the tokens of its prompt, how many positions it took from the prefix cache, and
    how often it was preempted.

    `cached_loads` are the loads that computed these positions, in their order, -1 for the base model and -2 for
    an adapter without a slot; None if that is not known. The weights of a load may have changed since then.
    `prompt_ids` are the tokens of the prompt, if the engine was asked to keep tokens.
    """

    prompt: int
    cached: int = 0
    cached_loads: list[int] | None = None
    preemptions: int = 0
    prompt_ids: list[int] | None = None


class RequestRecord(msgspec.Struct, frozen=True):
    """One request and its answer. `prompt` is the index in the spec's prompts; `logprobs` are those of `output_ids`,
    None if the engine returned no number (NaN). If the answer begins with forced tokens, `text` contains them too;
    `forced_text` and `generated_text` are its parts (None in engines that do not write them, and in older traces)."""

    id: str
    prompt: int
    adapter: str | None
    prompt_ids: list[int]
    output_ids: list[int]
    text: str
    logprobs: list[float | None] = []
    seconds: float = 0.0
    forced_text: str | None = None
    generated_text: str | None = None


class Score(msgspec.Struct, frozen=True):
    """One scored pass: `prompt_ids` and all but the last of `answer_ids` in one forward pass, with the adapter, without
    it, or through a model that has none. `unmeasured` is why its distributions were not kept; empty if they were."""

    request: str
    prompt: int
    kind: ScoreKind
    prompt_ids: list[int]
    answer_ids: list[int]
    unmeasured: str = ""
