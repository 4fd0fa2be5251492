"""Small files that could take minutes or all memory: each is checked in linear time, or refused because of its size.

Cases that once took hours run in a process with a generous limit. If a look-up has replaced a scan, their results are
compared.
"""

from __future__ import annotations

import json
import re
import signal
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile import pickled, zipped
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from lora_probe import check
from lora_probe.adapter import AdapterConfig, open_adapter
from lora_probe.adapter.pattern_index import PatternIndex, beginnings, ends, is_word, plain_pattern
from lora_probe.adapter.targets import Targets
from lora_probe.base import EngineView, ModuleView, checkpoint, open_checkpoint
from lora_probe.cli.main import main
from lora_probe.errors import ProbeError, TooLarge, UnreadableFile
from lora_probe.files import regexes as patterns
from lora_probe.files.pickled import open_pickle
from lora_probe.files.regexes import EndlessPattern, Expressions, is_alike
from lora_probe.files.weights import MAX_NAME, MAX_PARTS, open_weights
from lora_probe.prediction.places import engine_names

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
EMPTY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
SECONDS = 60
"""A generous limit in seconds for all of these: most took hours."""
fuzzed = settings(derandomize=True, deadline=None, database=None, max_examples=300)


def adapter(folder: Path, names: Any, config: dict[str, Any] | None = None, header: bytes | None = None) -> Path:
    """A folder whose file holds tensors with these names and no values."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | (config or {})))
    text = header if header is not None else json.dumps(dict.fromkeys(names, EMPTY)).encode()
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    return folder


def halves(count: int, module: str = "model.layers.{}.self_attn.q_proj") -> list[str]:
    return [f"base_model.model.{module.format(n)}.lora_{half}.weight" for n in range(count) for half in "AB"]


def answer(*arguments: object) -> tuple[int, str]:
    """Exit status and output of the command line, in a process that ends after a minute."""
    script = "import sys; from lora_probe.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout + done.stderr


# Names of tensors.


@pytest.mark.slow
def test_a_key_that_stands_twice_among_many(tmp_path: Path) -> None:
    entries = [f'"k{n}":{json.dumps(EMPTY)}' for n in range(120_000)]
    folder = adapter(tmp_path / "a", (), header=("{" + ",".join([*entries, entries[-1]]) + "}").encode())
    status, said = answer("check", folder)
    assert status == 1
    assert "the key `k119999` appears twice" in " ".join(said.split())


@pytest.mark.parametrize(
    ("name", "found"),
    [
        (".".join("a" * 51_200) + ".q_proj", "has 102,406 characters, more than the limit of 2,000"),
        ("." * 200_000, "has 200,000 characters, more than the limit of 2,000"),
        ("a" * (MAX_NAME + 1), "has 2,001 characters, more than the limit of 2,000"),
        ("." * MAX_PARTS, "has 65 parts, more than the limit of 64"),
    ],
)
def test_a_name_that_no_tensor_has(tmp_path: Path, name: str, found: str) -> None:
    import torch

    weights = adapter(tmp_path / "a", [name]) / "adapter_model.safetensors"
    bin_file = pickled(tmp_path / "b.bin", {name: torch.ones(2)})
    for path, read in ((weights, open_weights), (bin_file, open_pickle)):
        with pytest.raises(TooLarge) as caught:
            read(path)
        assert f"`{path}`: the name of tensor `" in caught.value.message
        assert found in caught.value.message
        assert len(caught.value.message) < 500 + len(str(path))


def test_the_longest_names_that_are_judged(tmp_path: Path) -> None:
    import torch

    for name in ("a" * MAX_NAME, "." * (MAX_PARTS - 1)):
        assert list(open_weights(adapter(tmp_path / str(len(name)), [name]) / "adapter_model.safetensors").tensors)
        assert open_pickle(pickled(tmp_path / f"{len(name)}.bin", {name: torch.ones(2)})).tensors


@pytest.mark.slow
def test_a_hundred_thousand_empty_tensors(tmp_path: Path) -> None:
    names = [f"base_model.model.l{n}.lora_A.weight" for n in range(100_000)]
    status, said = answer("check", adapter(tmp_path / "a", names))
    assert status == 1
    assert "lora_A has shape [0], which is not a matrix (LP206)" in " ".join(said.split())


# Patterns of a config, against PEFT's own definition of each.


def first_key(keys: list[str], name: str) -> str | None:
    """PEFT's `get_pattern_key`."""
    return next((key for key in keys if re.match(rf"(.*\.)?({key})$", name)), None)


def compiles(*expressions: str) -> bool:
    try:
        for expression in expressions:
            patterns.compiled(expression)
    except (re.error, OverflowError, RecursionError):
        return False
    return True


KEYS = st.lists(st.text("ab.^\\-*|?$()\n", max_size=5) | st.text("ab.", max_size=5), max_size=6, unique=True)
NAMES = st.lists(st.text("ab.-\n", max_size=7) | st.text("ab.", max_size=7), max_size=6)


@fuzzed
@given(KEYS, NAMES)
@example(["b.a", "^b.a", "a"], ["b.a", "bba", "x.b.a", "b.a\n", "\n.a", "a\n\n"])
@example([r"b\.a", r"^b\.a", r"a\-b", "a-b", "", "^"], ["b.a", "bba", "x.b.a", "a-b", "x.a-b", "", "a.", "\n"])
def test_patterns_are_found_as_peft_finds_them(keys: list[str], names: list[str]) -> None:
    assume(compiles(*keys, *(rf"(.*\.)?({key})$" for key in keys)))
    index = PatternIndex("rank_pattern", keys, Expressions(Path("adapter_config.json")))
    for name in names:
        assert index.first(name) == first_key(keys, name), name
    assert index.idle(names) == [key for key in keys if all(first_key([key], name) is None for name in names)]


def test_what_is_plain() -> None:
    for key in ("q_proj", "model.layers.0.q_proj", "^q_proj", r"q\.proj", "q-proj", "é", ""):
        assert plain_pattern(key) is not None, key
    for key in ("q_proj$", "q.*", "a|b", r"\d", "(a)", "a^", "a\n", "a\\"):
        assert plain_pattern(key) is None, key


@pytest.mark.slow
def test_a_hundred_thousand_plain_patterns(tmp_path: Path) -> None:
    table = {f"k{n}": 1 for n in range(100_000)} | {"model.layers.7.self_attn.q_proj": 8, "^model": 3}
    folder = adapter(tmp_path / "a", halves(400), {"alpha_pattern": table, "rank_pattern": dict(table)})
    status, said = answer("check", folder)
    assert status == 1
    assert "no module of the adapter matches `k0`, `k1`, `k2`, `k3`, `k4` and 99996 more in alpha_pattern" in said
    config = open_adapter(folder).config
    assert config.rank_of("model.layers.7.self_attn.q_proj") == 8
    assert config.rank_of("model") == 3


@pytest.mark.slow
def test_as_many_shapes_of_keys_as_there_are(tmp_path: Path) -> None:
    """A dot matches any character, so every combination of dot positions needs its own comparison."""
    keys = ["".join("." if number >> place & 1 else "a" for place in range(13)) + "b" for number in range(2**13)]
    names = [f"{'a' * 13}{n:06}"[-14:] for n in range(10_000)]
    index = PatternIndex("rank_pattern", keys, Expressions(tmp_path / "adapter_config.json"))
    with pytest.raises(TooLarge, match=r"the 8,192 keys of `rank_pattern` .* more than 200,000,000 comparisons"):
        all(index.first(name) is None for name in names)


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern", "modules_to_save", "layers_pattern"])
def test_more_expressions_than_any_config_has(tmp_path: Path, field: str) -> None:
    def config(count: int) -> dict[str, Any]:
        names = [f"x{n}.*y" for n in range(count)]
        return {field: dict.fromkeys(names, 1) if field.endswith("k_pattern") or field[0] == "a" else names}

    assert open_adapter(adapter(tmp_path / "few", halves(1), config(1_000))).modules
    folder = adapter(tmp_path / "many", halves(1), config(1_001))
    with pytest.raises(TooLarge) as caught:
        open_adapter(folder)
    path = folder / "adapter_config.json"
    expected = f"`{path}`: `{field}` holds 1,001 regular expressions, more than the limit of 1,000"
    assert caught.value.message == expected


def test_an_expression_of_a_million_characters(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a", halves(1), {"target_modules": "a" * 1_000_000})
    with pytest.raises(TooLarge, match=r"in `target_modules` has 1,000,000 characters, more than the limit of 100,000"):
        open_adapter(folder)


# Lists of names in a config.

PATHS = st.lists(st.text("ab.\n", max_size=7), max_size=6)
WORDS = st.lists(st.text("ab.", max_size=4), max_size=5)


def targets(modules: Any = ("a",), **raw: Any) -> Targets:
    return Targets(raw, modules, Expressions(Path("adapter_config.json")))


@fuzzed
@given(st.lists(st.text("ab.*|\n", max_size=4), max_size=5), PATHS)
@example(["a", "b"], ["a\nb", "b.a\n", "a\n\n", "x.a\ny", "", "\n"])
@example([""], ["", ".", "a.", "\n", "a"])
def test_modules_to_save_are_found_as_peft_finds_them(saved: list[str], names: list[str]) -> None:
    assume(compiles(*saved, *(rf"(^|.*\.){part}($|\..*)" for part in saved)))
    found = targets("(?s:.*)", modules_to_save=saved)
    for name in names:
        assert found.module(name) != any(re.match(rf"(^|.*\.){part}($|\..*)", name) for part in saved), name


def test_three_thousand_modules_to_save(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a", halves(400), {"modules_to_save": [f"s{n}" for n in range(3_000)]})
    status, said = answer("check", folder)
    assert status == 1
    assert "modules_to_save s0, s1, s2, s3, s4, s5, s6, s7, s8, s9 and 2990 more" in " ".join(said.split())
    assert "refused by vllm (LP406)" in said


@fuzzed
@given(WORDS, WORDS, WORDS, PATHS)
def test_lists_of_names_are_found_as_peft_finds_them(
    modules: list[str], excluded: list[str], parameters: list[str], names: list[str]
) -> None:
    found = targets(tuple(modules), exclude_modules=excluded, target_parameters=parameters)

    def held(wanted: list[str], name: str) -> bool:
        return any(name == one or name.endswith(f".{one}") for one in wanted)

    for name in names:
        assert found.parameter(name) == held(parameters, name)
        by_name = held(modules, name) and not held(excluded, name)
        assert found.module(name) == (by_name or held(parameters, f"{name}.weight"))


@fuzzed
@given(st.lists(st.text("ab.", max_size=4) | st.sampled_from(["experts.w", "w", "w2"]), max_size=5), PATHS)
@example(["w", "w"], ["experts", "a.experts"])
def test_parameters_of_a_module_are_those_of_the_scan(parameters: list[str], names: list[str]) -> None:
    found = targets(target_parameters=parameters)
    for module in [*names, "experts", "a.experts"]:
        split = [target.rpartition(".") for target in parameters]
        bare = module.rpartition(".")[2] == "experts"
        mine = [
            name for home, _, name in split if (bare if not home else module == home or module.endswith(f".{home}"))
        ]
        assert min(len(mine), 2) == len(found.parameters_of(module))
        if len(mine) == 1:
            assert found.parameters_of(module) == mine


@pytest.mark.slow
def test_a_hundred_thousand_target_parameters(tmp_path: Path) -> None:
    parameters = [f"m{n}.experts.w{n}" for n in range(100_000)]
    names = halves(1_000, "m{}.experts")
    status, _ = answer("check", adapter(tmp_path / "a", names, {"target_parameters": parameters}))
    assert status == 1
    found = {module.module: module.parameter for module in open_adapter(tmp_path / "a").modules}
    assert found == {f"m{n}.experts": f"w{n}" for n in range(1_000)}


def test_ends_and_beginnings() -> None:
    assert list(ends("a.b.c")) == ["a.b.c", "b.c", "c"]
    assert list(ends("a.")) == ["a.", ""]
    assert list(ends("")) == [""]
    assert list(beginnings("a.b.c")) == ["a.b", "a"]
    assert list(beginnings("a")) == []
    assert is_word("q_proj")
    assert not is_word("q.proj")


@fuzzed
@given(PATHS, PATHS)
def test_the_engines_names_are_those_of_all_ends(modules: list[str], names: list[str]) -> None:
    view = EngineView("vllm", "", "", {name: ModuleView("linear", None, name) for name in modules})
    shapes = dict.fromkeys(names, (1, 1))
    suffixes: dict[str, list[str]] = {}
    for name in view.modules:
        for end in list(ends(name))[1:]:
            suffixes.setdefault(end, []).append(name)
    expected: dict[str, str] = {}
    for name in shapes:
        if name in view.modules:
            expected[name] = name
        elif len(suffixes.get(name, [])) == 1:
            expected.setdefault(suffixes[name][0], name)
    assert engine_names(view, shapes) == expected


# What a finding prints.


def test_values_are_printed_in_part(tmp_path: Path) -> None:
    long = "x" * 1_000_000
    odd = {
        "task_type": long,
        "bias": long,
        "init_lora_weights": long,
        "lora_dropout": [long] * 3,
        "target_modules": [long],
    }
    folder = adapter(tmp_path / "a", halves(1), odd | {"rank_pattern": {long[:1_000]: 1}, "modules_to_save": [long]})
    for version in ("0.31", "0.32"):
        diagnostics = [d for ask in ([], ["LP4"]) for d in check(folder, vllm_version=version, select=ask).diagnostics]
        assert {"LP111", "LP112", "LP406", "LP105"} <= {diagnostic.code for diagnostic in diagnostics}
        assert all(len(diagnostic.message) < 500 for diagnostic in diagnostics)


@pytest.mark.slow
@pytest.mark.parametrize(("key", "code"), [("k{}", "LP104"), ("use_{}", "LP110"), ("{}_config", "LP110")])
def test_a_hundred_thousand_keys_have_a_dozen_findings(tmp_path: Path, key: str, code: str) -> None:
    folder = adapter(tmp_path / "a", halves(1))
    fields = [f'"{key.format(n)}": 1' for n in range(100_000)]
    times = 2 if code == "LP104" else 1
    text = json.dumps(CONFIG)[:-1] + "".join(f", {field}" for field in fields * times) + "}"
    (folder / "adapter_config.json").write_text(text)
    status, said = answer("check", folder, "--format", "json", "--select", code)
    assert status == (0 if code == "LP104" else 1)
    messages = [one["message"] for one in json.loads(said[: said.rindex("}") + 1])["diagnostics"]]
    assert len(messages) == 11
    assert "and 99985 more" in messages[-1]


def test_a_gap_of_a_billion_layers(tmp_path: Path) -> None:
    names = [name.replace("layers.2.", "layers.999999999.") for name in halves(3)]
    status, _ = answer("check", adapter(tmp_path / "a", names))
    assert status == 1


# Expressions that take time, and expressions that two modules read in two ways.


def test_an_expression_that_is_slow_for_every_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "PATIENCE_FOR_ONE", 0.5)
    slow = r".*\.(a|aa)+\.z_proj"
    folder = adapter(tmp_path / "a", halves(300, "m{}." + "a" * 24), {"target_modules": slow})
    with pytest.raises(TooLarge) as caught:
        check(folder)
    where = f"`{folder / 'adapter_config.json'}`: the expression `{slow}`"
    assert caught.value.message.startswith(f"{where} takes more than ")


def test_expressions_that_are_slow_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "PATIENCE_FOR_ALL", 0.3)
    expressions = Expressions(Path("adapter_config.json"))
    with pytest.raises(TooLarge, match="expressions take more than "):
        all(expressions.match(rf".*(a|aa)+{number}", "a" * 24) is None for number in range(200))


@pytest.mark.slow
@pytest.mark.parametrize("endless", [r"(a+)+$", r"(?i)(a+)+$"])
def test_an_expression_without_an_end(endless: str) -> None:
    with pytest.raises(EndlessPattern, match="takes more than 1 s on one module name"):
        Expressions(Path("adapter_config.json")).match(endless, "a" * 200 + "c")


def test_an_expression_without_an_end_is_a_finding(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a", halves(1), {"target_modules": r"(?:[a-z]+|\w+|[\w.]+)+[A-Z]"})
    (found,) = check(folder).diagnostics
    assert found.code == "LP101"
    assert "takes more than 1 s on one module name" in found.message


def test_what_is_endless_for_regex_alone_is_judged() -> None:
    """`re` makes one set of such alternatives, and PEFT does not hang."""
    assert Expressions(Path("x")).fullmatch(r"(?:a|[a-z]|\w|[\w.])+[A-Z]", "model.layers.0.q_proj") is None


PIECES = [
    *(
        "a",
        "b",
        "q_",
        ".",
        "-",
        " ",
        "/",
        "1",
        "é",
        "ſ",
        "\n",
        "[ab]",
        "[^a]",
        "[a-c.]",
        "[[:alpha:]]",
        "[]a]",
        "[a||b]",
    ),
    *(
        r"\.",
        r"\w",
        r"\W",
        r"\d",
        r"\D",
        r"\s",
        r"\S",
        r"\b",
        r"\B",
        r"\Z",
        r"\-",
        r"\{",
        "^",
        "$",
        "|",
        "(",
        "(?:",
        ")",
    ),
    *(
        "*",
        "+",
        "?",
        "*?",
        "+?",
        "??",
        "{2}",
        "{1,}",
        "{,2}",
        "{1,2}?",
        "{e}",
        "{i<=1}",
        "{",
        "}",
        "++",
        "(?i)",
        "(?=a)",
    ),
    *("(?P<n>", "(?#", "(?>", r"\1", "(?m)", "(?<!b)"),
]


@pytest.mark.slow
@settings(fuzzed, max_examples=2_000)
@given(
    st.lists(st.sampled_from(PIECES), max_size=8).map("".join),
    st.lists(st.text("abq_.-1 é\nAS", max_size=8), max_size=4),
)
@example("(?:zz){e}", ["zz", "model.layers.0.zz", "z"])
@example("[[:alpha:]]", ["a", "a]", ":]"])
@example(r"\w+", ["é", "a"])
@example(r"\B", ["", "ab"])
@example(r"a$", ["a\n", "a"])
def test_expressions_match_as_re_matches(pattern: str, names: list[str]) -> None:
    assume(compiles(pattern))
    expressions = Expressions(Path("adapter_config.json"))
    for name in names:
        exact = patterns.compiled(pattern)
        assert (expressions.match(pattern, name) is None) == (exact.match(name) is None), name
        assert (expressions.fullmatch(pattern, name) is None) == (exact.fullmatch(name) is None), name


def test_which_expressions_are_alike() -> None:
    real = [r".*\.layers\.(0|1[0-5])\.self_attn\.(q|k|v)_proj", r"model\.layers\.\d+\.mlp\..*_proj", "[^.]*_proj"]
    assert all(is_alike(pattern) for pattern in real)
    odd = ["(?:zz){e}", "[[:alpha:]]", "(?i)a", "(?=a)b", "(ab)*", "a++", "a{", r"\Z", "é", "[a&&b]", "[]a]", "(?#a)"]
    assert not any(is_alike(pattern) for pattern in odd)


def test_a_fuzzy_expression_targets_nothing(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a", (), {"target_modules": "(?:zz){e}"})
    ones = {name: np.ones((2, 2), np.float32) for name in halves(1, "model.layers.{}.zz")}
    save_file(ones, folder / "adapter_model.safetensors")
    assert [one.code for one in check(folder).diagnostics] == ["LP106"]


@pytest.mark.slow
def test_the_timer_is_put_back() -> None:
    def mine(*_: object) -> None: ...

    before = signal.signal(signal.SIGVTALRM, mine)
    signal.setitimer(signal.ITIMER_VIRTUAL, 500, 300)
    try:
        expressions = Expressions(Path("adapter_config.json"))
        assert expressions.match("(?i)A", "a")
        with pytest.raises(EndlessPattern):
            expressions.match("(?i)(a+)+$", "a" * 40 + "b")
        assert signal.getsignal(signal.SIGVTALRM) is mine
        left, interval = signal.getitimer(signal.ITIMER_VIRTUAL)
        assert 400 < left < 501
        assert interval == 300
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def test_other_threads_judge_what_regex_can() -> None:
    said: list[Any] = []

    def judge() -> None:
        expressions = Expressions(Path("adapter_config.json"))
        said.append(expressions.match(r".*\.q_proj", "a.q_proj"))
        try:
            expressions.match("(?i)a", "a")
        except ProbeError as error:
            said.append(error)

    thread = threading.Thread(target=judge)
    thread.start()
    thread.join()
    assert said[0] is not None
    assert not isinstance(said[1], UnreadableFile)
    assert said[1].message == (
        "`adapter_config.json`: the expression `(?i)a` cannot be matched outside of the main thread"
    )


# Pickles, of which `test_pickled.py` has more.


@pytest.mark.parametrize("form", ["archive", "legacy"])
def test_a_key_that_is_hashed_for_ever(tmp_path: Path, form: str) -> None:
    content = b"\x80\x02}()" + b"q\x00h\x00\x86" * 60 + b"K\x01u."
    folder = adapter(tmp_path / "a", ())
    (folder / "adapter_model.safetensors").unlink()
    pickled(folder / "adapter_model.bin", zipped(content) if form == "archive" else content)
    status, said = answer("check", folder)
    assert status == 1
    assert "it holds a tuple of more than 200 values" in " ".join(said.split())


# Files of a whole model.


def model(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def test_a_name_that_counts_all_the_shards_there_could_be(tmp_path: Path) -> None:
    folder = model(tmp_path / "model")
    shard = folder / "model-00001-of-99999999999.safetensors"
    shard.write_bytes(b"")
    with pytest.raises(TooLarge) as caught:
        open_checkpoint(folder)
    expected = f"`{shard}` is one of 99,999,999,999 files according to its name, more than the limit of 10,000"
    assert caught.value.message == expected


@pytest.mark.slow
def test_an_index_of_twenty_thousand_missing_files(tmp_path: Path) -> None:
    folder = model(tmp_path / "model")
    placed = {f"model.layers.{n}.w": f"model-{n:05}.safetensors" for n in range(20_000)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    script = (
        "import sys\nfrom lora_probe.base import open_checkpoint\nfrom lora_probe.errors import UnreadableFile\n"
        "try:\n    open_checkpoint(sys.argv[1])\nexcept UnreadableFile as error:\n    print(error.message)\n"
    )
    command = [sys.executable, "-c", script, str(folder)]
    said = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True).stdout.strip()
    names = ", ".join(f"model-{n:05}.safetensors" for n in range(checkpoint.MOST_NAMED))
    assert said.startswith(f"`{folder}` is incomplete: {names} and 19,995 more files are missing, which holds layers ")
    assert len(said) < 700


# What the user sees of a refusal by size.


def test_one_clear_error_and_no_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    large = adapter(tmp_path / "large", ["a" * 3_000])
    assert main(["check", str(large)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("error: ") == 1
    assert "has 3,000 characters, more than the limit of 2,000" in err
    assert main(["inspect", str(large)]) == 2
    assert "has 3,000 characters" in capsys.readouterr().err
    adapter(tmp_path / "small", halves(1))
    assert main(["check", "--recursive", str(tmp_path), "--format", "json"]) == 2
    out, err = capsys.readouterr()
    assert [Path(one["adapter"]).name for one in json.loads(out)["reports"]] == ["small"]
    assert "LP208" not in out


def test_a_base_that_is_not_judged_is_not_called_missing(tmp_path: Path) -> None:
    base = model(tmp_path / "base")
    text = json.dumps({"a" * 3_000: EMPTY}).encode()
    (base / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    folder = adapter(tmp_path / "a", halves(1), {"base_model_name_or_path": str(base)})
    assert any("3,000 characters" in note for note in check(folder).notes)
    with pytest.raises(TooLarge):
        check(folder, model=str(base))


def test_rank_and_scaling_of_a_config(tmp_path: Path) -> None:
    folder = adapter(
        tmp_path / "a",
        halves(2),
        {"rank_pattern": {"1.self_attn.q_proj": 4}, "alpha_pattern": {"^q": 1, ".*q_proj": 8}},
    )
    config: AdapterConfig = open_adapter(folder).config
    assert [config.rank_of(f"model.layers.{n}.self_attn.q_proj") for n in (0, 1)] == [2, 4]
    assert [config.scaling_of(f"model.layers.{n}.self_attn.q_proj") for n in (0, 1)] == [4.0, 2.0]
