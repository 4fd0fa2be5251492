"""Breaks the judgements on purpose, one at a time: `python tests/mutants.py [PART OF A NAME ...]` (`make mutants`).

In: every rule, which is disabled, and every condition of the functions in `JUDGING`, which is made always true or
always false. Out: a table of the fast tests that failed, and exit status 1 if none did. A mutant is new code for the
live function, in a fork of a process that has collected the tests; only tests that call the function run, quick ones
first. Which tests call which function is recorded once, and results are kept, both until a source or a test changes.
"""

from __future__ import annotations

import ast
import copy
import hashlib
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from itertools import zip_longest
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest
from _pytest.runner import runtestprotocol

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "build" / "mutants.json"
JUDGING = {
    "lora_probe/ledger.py": ("if", "bool", "compare"),
    "lora_probe/rules/stored.py": ("if",),
    "lora_probe/prediction/*.py": ("if",),
    "lora_probe/engines/load_record.py": ("if",),
    "lora_probe/engines/sampler.py": ("if",),
}
"""Files whose functions judge, and what of them is broken."""
EQUIVALENT = {
    "ledger.headline: `if row.decisive` left out": "all rows are unknown there",
    "ledger.clauses: `if row.decisive` left out": "the rows of a group have a decisive station each",
    "stored.expect: `if key[0] not in modules` left out": "a module of the base is its own home",
    "stored.expect: `spectra is None` always holds": "a spectrum that is computed again is the same",
    "stored.expect: `plain` always holds": "no engine gives a shape for fused experts",
    "stored._homes: `not shapes` never holds": "without shapes no name has a candidate",
    "peft._judge: `adaptable` always holds": "PEFT refuses such a target as a whole (LP307)",
}
"""Mutants that no test can notice, each with why."""
WORKERS = os.cpu_count() or 1


@dataclass(frozen=True)
class Mutant:
    name: str
    module: str
    function: str
    code: CodeType

    def apply(self) -> None:
        live(self.module, self.function).__code__ = self.code


def live(module: str, qualname: str) -> FunctionType:
    """The function that runs, whatever is wrapped around it: all who have imported it have this object."""
    found: Any = import_module(module)
    for name in qualname.split("."):
        found = vars(found)[name]
    for inner in ("fget", "func", "__wrapped__"):
        found = getattr(found, inner, found)
    assert isinstance(found, FunctionType), qualname
    return found


def module_of(path: str) -> str:
    return path.removesuffix(".py").replace("/", ".")


def mutants() -> Iterator[Mutant]:
    for path in sorted((ROOT / "lora_probe" / "rules").glob("*.py")):
        file = str(path.relative_to(ROOT))
        for function in ast.parse(path.read_text()).body:
            if isinstance(function, ast.FunctionDef) and (code := rule_of(function)):
                yield Mutant(f"{code} is silent", module_of(file), function.name, SILENT)
    for pattern, kinds in JUDGING.items():
        for path in sorted(ROOT.glob(pattern)):
            tree = ast.parse(path.read_text())
            for qualname, function in functions(tree):
                for words, changed in broken(tree, function, kinds):
                    code = code_of(compile(changed, str(path), "exec"), qualname)
                    if code is not None:
                        yield Mutant(
                            f"{path.stem}.{qualname}: {words}", module_of(str(path.relative_to(ROOT))), qualname, code
                        )


def rule_of(function: ast.FunctionDef) -> str:
    """The code of the rule that a function is, or nothing."""
    for decorator in function.decorator_list:
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) in ("rule", "survey"):
            return next(str(arg.value) for arg in decorator.args if isinstance(arg, ast.Constant))
    return ""


def _silent(*_: Any, **__: Any) -> Any:
    return None if len(_) != 1 or not hasattr(_[0], "adapter") else ()


SILENT = _silent.__code__
"""A survey is asked with the one thing that it judges, and a rule on a pair with its facts."""


def functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, node
        elif isinstance(node, ast.ClassDef):
            for method in node.body:
                if isinstance(method, ast.FunctionDef):
                    yield f"{node.name}.{method.name}", method


def broken(tree: ast.Module, function: ast.FunctionDef, kinds: tuple[str, ...]) -> Iterator[tuple[str, ast.Module]]:
    """The module with one condition of the function replaced, and what was done, in words."""
    seen: set[str] = set()
    for number, node in enumerate(ast.walk(function)):
        for words, put in changes(node, kinds):
            while words in seen:
                words += "'"
            seen.add(words)
            # The copy is walked in the same order.
            whole = copy.deepcopy(tree)
            twin = next(twin for twin in functions_at(whole) if twin.lineno == function.lineno)
            target = next(inner for at, inner in enumerate(ast.walk(twin)) if at == number)
            put(target)
            yield words, ast.fix_missing_locations(whole)


def functions_at(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    return (function for _, function in functions(tree))


def changes(node: ast.AST, kinds: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    if isinstance(node, ast.If | ast.IfExp):
        text = ast.unparse(node.test)
        for value, words in ((False, "never"), (True, "always")):

            def put(target: Any, value: bool = value) -> None:
                target.test = ast.Constant(value)

            yield f"`{text}` {words} holds", put
    if isinstance(node, ast.BoolOp) and "bool" in kinds:
        for index, part in enumerate(node.values):

            def drop(target: Any, index: int = index) -> None:
                del target.values[index]
                if len(target.values) == 1:
                    target.values.append(target.values[0])

            yield f"`{ast.unparse(part)}` left out", drop
    if isinstance(node, ast.Compare) and "compare" in kinds and isinstance(node.ops[0], ast.Eq | ast.NotEq | ast.Gt):

        def turn(target: Any) -> None:
            turned = {ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Gt: ast.LtE}[type(target.ops[0])]
            target.ops[0] = turned()

        yield f"`{ast.unparse(node)}` turned round", turn
    if isinstance(node, ast.comprehension) and node.ifs:

        def without(target: Any) -> None:
            target.ifs = []

        yield f"`if {ast.unparse(node.ifs[0])}` left out", without


def code_of(code: CodeType, qualname: str) -> CodeType | None:
    if code.co_qualname == qualname:
        return code
    inner = (code_of(constant, qualname) for constant in code.co_consts if isinstance(constant, CodeType))
    return next((found for found in inner if found is not None), None)


class Hunt:
    """A pytest plugin: instead of running the tests once, it runs some of them for each mutant."""

    def __init__(self, wanted: list[str]) -> None:
        self.wanted = wanted
        self.survivors = 0

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if session.testsfailed:
            raise session.Interrupted("the tests cannot be collected")
        items = {item.nodeid: item for item in session.items}
        kept = Kept()
        if new := {test: item for test, item in items.items() if file_of(test) in kept.changed}:
            print(f"recording which functions {len(new)} tests run", flush=True)
            kept.record(new)
        todo = [one for one in mutants() if not self.wanted or any(word in one.name for word in self.wanted)]
        running: dict[int, Mutant] = {}
        while todo or running:
            while todo and len(running) < WORKERS:
                mutant = todo.pop(0)
                if mutant.name in kept.caught:
                    self.tell(mutant, kept.caught[mutant.name])
                    continue
                running[start(mutant, kept, items)] = mutant
            if running:
                pid, _ = os.waitpid(-1, 0)
                if pid in running:
                    self.ended(running.pop(pid), pid, kept)
        print(f"\n{self.survivors} survived", flush=True)
        session.testsfailed = self.survivors
        return True

    def ended(self, mutant: Mutant, pid: int, kept: Kept) -> None:
        path = answer_of(pid)
        caught = path.read_text() if path.exists() else "(its process died)"
        path.unlink(missing_ok=True)
        kept.add(mutant.name, caught)
        self.tell(mutant, caught)

    def tell(self, mutant: Mutant, caught: str) -> None:
        if caught:
            told = caught
        elif mutant.name in EQUIVALENT:
            told = f"no test can: {EQUIVALENT[mutant.name]}"
        else:
            self.survivors += 1
            told = "SURVIVED"
        print(f"{mutant.name:<60}  {told}", flush=True)


class Kept:
    """What is known already: the tests that run each function, their seconds, and who caught which mutant.

    Only what has changed is done again: the tests of a file that is another one, and the mutants that these had caught
    or that nobody had. Other code than that of tests changes all.
    """

    def __init__(self) -> None:
        self.key = digest(path for path in sources() if not path.name.startswith("test_"))
        self.files = {path.name: digest([path]) for path in sources() if path.name.startswith("test_")}
        self.users: dict[str, list[str]] = {}
        self.seconds: dict[str, float] = {}
        self.caught: dict[str, str] = {}
        self.changed = set(self.files)
        if KEPT.exists() and (known := json.loads(KEPT.read_text()))["key"] == self.key:
            self.changed = {name for name in self.files if known["files"].get(name) != self.files[name]}
            stays = set(self.files) - self.changed
            self.users = {f: [t for t in tests if file_of(t) in stays] for f, tests in known["users"].items()}
            self.seconds = {test: seconds for test, seconds in known["seconds"].items() if file_of(test) in stays}
            self.caught = {mutant: test for mutant, test in known["caught"].items() if file_of(test) in stays}

    def add(self, name: str, caught: str) -> None:
        self.caught[name] = caught
        self.write()

    def write(self) -> None:
        KEPT.parent.mkdir(exist_ok=True)
        KEPT.write_text(json.dumps({name: value for name, value in vars(self).items() if name != "changed"}))

    def record(self, items: dict[str, pytest.Item]) -> None:
        """Run the tests once, unbroken, in a fork; what its own forks run counts as well."""
        with tempfile.NamedTemporaryFile("r", suffix=".tsv") as log:
            pid = os.fork()
            if pid == 0:
                number = os.open(log.name, os.O_WRONLY | os.O_APPEND)
                own_folders()
                seen: set[tuple[str, CodeType]] = set()
                current = ""

                def called(frame: Any, event: str, _: Any) -> None:
                    code = frame.f_code
                    if event == "call" and (current, code) not in seen:
                        seen.add((current, code))
                        if "/lora_probe/" in code.co_filename:
                            where = module_of(code.co_filename.partition(f"{ROOT}/")[2])
                            os.write(number, f"{current}\t{where}:{code.co_qualname}\t0\n".encode())

                threading.settrace(called)
                sys.settrace(called)
                begun, names = time.monotonic(), [*items, ""]
                current = names.pop(0)
                for _, passed in run(list(items.values())):
                    os.write(number, f"{current}\t{'' if passed else 'FAILED'}\t{time.monotonic() - begun}\n".encode())
                    begun, current = time.monotonic(), names.pop(0)
                os._exit(0)
            assert os.waitpid(pid, 0)[1] == 0
            users = {function: set(tests) for function, tests in self.users.items()}
            for line in log:
                # Names of tests hold anything, also tabs.
                test, function, seconds = line.rstrip("\n").rsplit("\t", 2)
                users.setdefault(function, set()).add(test)
                self.seconds[test] = max(float(seconds), self.seconds.get(test, 0))
        failing = users.pop("FAILED", set())
        if failing:
            print(f"left out, as these fail unbroken: {', '.join(sorted(failing))}", flush=True)
            users = {name: tests - failing for name, tests in users.items()}
        self.users = {name: sorted(tests, key=lambda test: self.seconds.get(test, 0)) for name, tests in users.items()}
        self.write()


def start(mutant: Mutant, kept: Kept, items: dict[str, pytest.Item]) -> int:
    """A process that runs the tests of the mutant's function until one fails, and writes down which."""
    if (pid := os.fork()) != 0:
        return pid
    caught = "(its process failed)"
    # Nothing that happens here may lead back into the loop of the process that was forked.
    try:
        own_folders()
        mutant.apply()
        tests = [items[test] for test in kept.users.get(f"{mutant.module}:{mutant.function}", ()) if test in items]
        caught = next((item.nodeid for item, passed in run(tests) if not passed), "")
    finally:
        answer_of(os.getpid()).write_text(caught)
        os._exit(0)


def answer_of(pid: int) -> Path:
    return Path(tempfile.gettempdir()) / f"lora-probe-mutant-{os.getuid()}-{pid}"


def own_folders() -> None:
    """Temporary folders and a cache of this fork's own, and nothing that it prints."""
    folder = tempfile.mkdtemp(prefix="lora-probe-mutant-")
    os.environ["XDG_CACHE_HOME"] = folder
    config = _config[0]
    config._tmp_path_factory._basetemp = Path(folder)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)


_config: list[Any] = []


def run(tests: list[pytest.Item]) -> Iterator[tuple[pytest.Item, bool]]:
    """Each test with whether it passed."""
    for item, following in zip_longest(tests, tests[1:]):
        reports = runtestprotocol(item, log=False, nextitem=following)
        yield item, all(report.passed or report.skipped for report in reports)


def file_of(test: str) -> str:
    return Path(test.partition("::")[0]).name


def sources() -> Iterator[Path]:
    for folder in ("lora_probe", "tests"):
        yield from sorted((ROOT / folder).rglob("*.py"))


def digest(paths: Iterable[Path]) -> str:
    """This file decides nothing about what tests do."""
    found = hashlib.sha256()
    for path in paths:
        if path != Path(__file__).resolve():
            found.update(path.read_bytes())
    return found.hexdigest()


class Config:
    def pytest_configure(self, config: pytest.Config) -> None:
        _config.append(config)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "tests"))
    os.chdir(ROOT)
    sys.exit(pytest.main(["-m", "not slow", "-q", "-p", "no:cacheprovider"], [Config(), Hunt(sys.argv[1:])]))
