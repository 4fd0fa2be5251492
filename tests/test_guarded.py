"""The separate process in which untrusted files are read: its limits hold whatever the work does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import heed_interrupts

from lora_probe.checking import Report
from lora_probe.checking.folders import NotJudged
from lora_probe.checking.judging import MANY, Judged, judged
from lora_probe.errors import ProbeError, UnreadableFile
from lora_probe.files import guarded, limits, threads
from lora_probe.files.guarded import OverBudget, Send, results
from lora_probe.files.limits import Budget

LITTLE = Budget(seconds=1, memory=64 * 2**20)


def doubled(times: int = 60) -> tuple[Any, ...]:
    """A tuple whose hash takes 2^times steps in C, where Python handles no signals."""
    value: tuple[Any, ...] = ()
    for _ in range(times):
        value = (value, value)
    return value


def hang(send: Send) -> None:
    limits.step("hashing a key", "a/adapter_model.bin")
    hash(doubled())


def test_what_is_handed_over_comes_in_order() -> None:
    assert list(results(lambda send: [send(number) for number in range(1000)] and None, Budget())) == list(range(1000))


@pytest.mark.slow
def test_a_hang_in_c_ends_with_the_budget() -> None:
    with pytest.raises(OverBudget) as raised:
        list(results(hang, LITTLE))
    assert raised.value.message == (
        "used up its CPU time while hashing a key (`a/adapter_model.bin`); "
        "the budget is 1 s of CPU time and 64 MiB of memory"
    )
    assert "--timeout" in raised.value.hint
    assert raised.value.exit_code == 2


@pytest.mark.parametrize("kind", ["bytes", "numpy", "list"])
def test_memory_ends_with_the_budget(kind: str) -> None:
    def take(send: Send) -> None:
        limits.step("reading", "weights")
        if kind == "bytes":
            send(len(bytearray(2**31)))
        elif kind == "numpy":
            send(float(np.ones(2**28).sum()))
        else:
            kept: list[Any] = []
            while True:
                kept.append([kept])

    with pytest.raises(OverBudget, match=r"used up its memory while reading \(`weights`\)"):
        list(results(take, LITTLE))


def test_little_is_enough_for_little() -> None:
    assert list(results(lambda send: send(float(np.ones(2**20).sum())), LITTLE)) == [2.0**20]


def test_room_for_a_mapped_file_is_added_once() -> None:
    def take(send: Send) -> None:
        limits.make_room(2**27)
        send(len(bytearray(2**27)))
        send(len(bytearray(2**29)))

    handed = results(take, LITTLE)
    assert next(handed) == 2**27
    with pytest.raises(OverBudget, match="used up its memory"):
        next(handed)


@pytest.mark.slow
def test_each_piece_of_work_has_a_budget_of_its_own(tmp_path: Path) -> None:
    def turns(send: Send) -> None:
        for number in range(3):
            limits.begin(tmp_path)
            end = time.process_time() + 0.8
            while time.process_time() < end:
                pass
            send(number)

    assert list(results(turns, Budget(seconds=1.5))) == [0, 1, 2]


def test_a_budget_grows_with_what_lies_on_disk_and_not_with_what_is_claimed(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "weights").write_bytes(os.urandom(1_000_000))
    (tmp_path / "below" / "weights").write_bytes(os.urandom(1_000_000))
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(2**40)
    (tmp_path / "circle").symlink_to(tmp_path)
    (tmp_path / "elsewhere").symlink_to(sys.executable)
    for number in range(100):
        (tmp_path / f"again-{number}").symlink_to("weights")
    assert 2_000_000 <= limits.held(tmp_path) < 2_100_000
    assert limits.held(tmp_path / "missing") == 0


def test_the_files_of_a_hub_snapshot_count(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a" / "snapshots" / "c0ffee", tmp_path / "models--a" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "1").write_bytes(os.urandom(1_000_000))
    (snapshot / "adapter_model.safetensors").symlink_to("../../blobs/1")
    assert 1_000_000 <= limits.held(snapshot) < 1_100_000


def test_errors_arrive_whole() -> None:
    def fail(send: Send) -> None:
        send(1)
        raise UnreadableFile("`a` is damaged", "copy it again")

    handed = results(fail, Budget())
    assert next(handed) == 1
    with pytest.raises(UnreadableFile) as raised:
        next(handed)
    assert (raised.value.message, raised.value.hint) == ("`a` is damaged", "copy it again")


def test_a_fault_of_ours_is_one_error_with_its_place() -> None:
    def fail(send: Send) -> None:
        raise KeyError("x")

    with pytest.raises(ProbeError, match=r"lora-probe failed: KeyError: 'x' \(test_guarded.py:\d+\)"):
        list(results(fail, Budget()))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_process_that_dies_is_an_error(number: signal.Signals) -> None:
    def die(send: Send) -> None:
        limits.step("loading", "x.bin")
        os.kill(os.getpid(), number)

    with pytest.raises(OverBudget, match=rf"its process ended with signal {number.name} while loading"):
        list(results(die, Budget()))


def test_a_process_that_dies_in_the_middle_of_a_message_is_an_error() -> None:
    def die(send: Send) -> None:
        limits.step("handing over")
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGKILL)).start()
        send(b"x" * 10**6)
        while True:
            send(b"x" * 10**8)

    with pytest.raises(OverBudget, match="ended with signal SIGKILL while handing over"):
        [time.sleep(0.05) for _ in results(die, Budget())]


@pytest.mark.slow
def test_a_limit_that_the_shell_has_ignored_holds() -> None:
    before = signal.signal(signal.SIGXCPU, signal.SIG_IGN)
    try:
        with pytest.raises(OverBudget, match="used up its CPU time"):
            list(results(hang, LITTLE))
    finally:
        signal.signal(signal.SIGXCPU, before)


def test_temporary_files_go_with_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    def leave(send: Send) -> None:
        (Path(tempfile.mkdtemp()) / "left").touch()
        send(tempfile.gettempdir())
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    handed = results(leave, Budget())
    assert Path(next(handed)).parent == tmp_path
    with pytest.raises(OverBudget):
        next(handed)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_nothing_is_left_when_nobody_listens_any_more() -> None:
    handed = results(lambda send: [send(os.getpid()) for _ in range(10**6)] and None, Budget())
    pid = next(handed)
    handed.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def report(folder: Path) -> Report:
    return Report(folder, None, {}, ())


@pytest.mark.slow
def test_others_are_judged_when_one_takes_too_much(tmp_path: Path) -> None:
    def check(folders: Any, **_: Any) -> Iterator[Report]:
        for folder in folders:
            limits.begin(folder)
            if folder.name == "hangs":
                hash(doubled())
            if folder.name == "fails":
                raise UnreadableFile("`fails` is damaged")
            if folder.name == "faults":
                raise ValueError("x")
            yield report(folder)

    folders = [tmp_path / name for name in ("one", "hangs", "fails", "faults", "two")]
    outcomes = list(judged(folders, check, None, LITTLE, lambda _: None))
    kinds = [type(outcome) for outcome in outcomes]
    assert kinds == [Judged, NotJudged, NotJudged, NotJudged, Judged]
    assert [one.error.message.partition(" while ")[0] for one in outcomes if isinstance(one, NotJudged)] == [
        f"`{tmp_path / 'hangs'}`: used up its CPU time",
        "`fails` is damaged",
        f"`{tmp_path / 'faults'}`: lora-probe failed: ValueError: x (test_guarded.py:{fault_line()})",
    ]


def fault_line() -> int:
    lines = Path(__file__).read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if 'raise ValueError("x")' in line)


def test_a_death_between_two_folders_costs_one_of_them() -> None:
    def check(folders: Any, **_: Any) -> Iterator[Report]:
        for folder in folders:
            yield report(folder)
            if folder.name == "one":
                os.kill(os.getpid(), signal.SIGKILL)

    outcomes = list(judged([Path(name) for name in ("one", "two", "three")], check, None, LITTLE, lambda _: None))
    assert [type(outcome) for outcome in outcomes] == [Judged, NotJudged, Judged]


def test_many_folders_are_judged_by_several_processes_in_order() -> None:
    """One of them dies; the report says which process judged each folder."""

    def check(folders: Any, **_: Any) -> Iterator[Report]:
        for folder in folders:
            if folder.name == "7":
                os.kill(os.getpid(), signal.SIGKILL)
            yield Report(folder, None, {}, (), notes=(str(os.getpid()), str(threads.processors())))

    folders = [Path(str(number)) for number in range(MANY)]
    outcomes = list(judged(folders, check, None, LITTLE, lambda _: None))
    assert [type(outcome) for outcome in outcomes] == [NotJudged if number == 7 else Judged for number in range(MANY)]
    reports = [outcome.report for outcome in outcomes if isinstance(outcome, Judged)]
    assert [report.adapter for report in reports] == [folder for folder in folders if folder.name != "7"]
    workers = {report.notes[0] for report in reports}
    # The one that died has a successor.
    assert len(workers) == threads.processors() + 1
    assert {report.notes[1] for report in reports} == {"1"} or threads.processors() == 1


@pytest.mark.slow
def test_what_is_wrong_before_the_first_folder_is_wrong_for_all() -> None:
    def check(folders: Any, **_: Any) -> Iterator[Report]:
        limits.step("opening the base")
        hash(doubled())
        yield from ()

    with pytest.raises(OverBudget, match="opening the base"):
        list(judged([Path("a"), Path("b")], check, None, LITTLE, lambda _: None))


HANGING = """
import sys
from lora_probe import adapter
from lora_probe.cli.main import main
def hang(path):
    value = ()
    for _ in range(60):
        value = (value, value)
    print("hanging", file=sys.stderr, flush=True)
    hash(value)
adapter.open_adapter = hang
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_hang_obeys_the_user(number: signal.Signals, status: int, adapter: Path) -> None:
    run = subprocess.Popen(
        [sys.executable, "-c", HANGING, "inspect", str(adapter)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,
    )
    assert run.stderr is not None
    assert run.stderr.readline() == "hanging\n"
    run.send_signal(number)
    out, err = run.communicate(timeout=20)
    assert (run.returncode, out, err) == (status, "", "error: interrupted\n")


@pytest.mark.slow
def test_a_command_that_is_killed_leaves_no_process(adapter: Path) -> None:
    run = subprocess.Popen(
        [sys.executable, "-c", HANGING.replace("hash(value)", "import time; time.sleep(60)"), "inspect", str(adapter)],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert run.stderr is not None
    assert run.stderr.readline() == "hanging\n"
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    assert len(children) == 1
    run.kill()
    run.wait()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{children[0]}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{children[0]}").exists()


@pytest.mark.slow
def test_limits_are_options_of_every_command_that_reads(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from conftest import call, edited

    for command in ("inspect", "check", "trace", "show", "compare", "parity"):
        status, out, _ = call(command, "--help", capsys=capsys)
        assert status == 0
        assert "--timeout SECONDS" in out
        assert "--max-memory GIB" in out
    status, _, err = call("inspect", adapter, "--timeout", "0", capsys=capsys)
    assert status == 2
    assert "`0` is not a valid number of seconds: expected a number greater than 0" in err
    status, _, err = call("inspect", adapter, "--max-memory", "0.001", capsys=capsys)
    assert status == 2
    assert "`0.001` is not a valid number of GiB: expected a number of at least 0.0625" in err
    large = edited(adapter, tmp_path / "large", config=lambda config: config | {"x": [{"y": {}}] * 900_000})
    status, out, err = call("inspect", large, "--max-memory", "0.0625", capsys=capsys)
    assert (status, out) == (2, "")
    assert "adapter_config.json" in err
    assert "memory" in err
    assert "--max-memory" in err
    assert err.count("error:") == 1
    status, out, _ = call("check", large, adapter, "--max-memory", "0.0625", "--format", "json", capsys=capsys)
    assert status == 2
    data = json.loads(out)
    assert "memory" in data["not_judged"][0]["message"]
    assert [one["adapter"] for one in data["reports"]] == [str(adapter)]


def test_output_that_the_terminal_cannot_encode(adapter: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "lora_probe", "inspect", str(adapter), "--norms"],
        env=os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=False,
    )
    assert run.returncode == 0
    assert b"\\u2016\\u0394W\\u2016" in run.stdout
    assert b"Traceback" not in run.stderr


def test_a_full_disk_is_one_error(adapter: Path) -> None:
    with Path("/dev/full").open("w") as full:
        run = subprocess.run(
            [sys.executable, "-m", "lora_probe", "inspect", str(adapter)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1] == "error: cannot write the output: No space left on device"


@pytest.mark.slow
@pytest.mark.parametrize(("closed", "status"), [(">&-", 0), (">&- 2>&-", 0), ("2>/dev/full", 0), ("2>&-", 0)])
def test_streams_that_are_closed(closed: str, status: int, adapter: Path) -> None:
    command = f"{sys.executable} -m lora_probe inspect {adapter} {closed}"
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert run.returncode == status
    assert "Traceback" not in run.stdout + run.stderr
    run = subprocess.run(["bash", "-c", f"{command} --module x"], capture_output=True, text=True, check=False)
    assert run.returncode == 2


@pytest.mark.slow
def test_reports_of_many_adapters_are_not_kept_in_memory(tmp_path: Path) -> None:
    """Only the process that prints is checked: it has no limit."""
    names = [f"base_model.model.model.layers.{n}.q_proj.lora_{half}.weight" for n in range(8_000) for half in "AB"]
    header = json.dumps({name: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for name in names}).encode()
    for number in range(6):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "adapter_config.json").write_text('{"peft_type": "LORA", "target_modules": ["x"]}')
        (tmp_path / str(number) / "adapter_model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    code = (
        "import sys; from lora_probe.cli.main import main; main(sys.argv[1:]);"
        "line = next(line for line in open('/proc/self/status') if line.startswith('VmHWM'));"
        "print(int(line.split()[1]) // 1024, file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, "check", str(tmp_path), "--recursive", "--format", "json"]
    run = subprocess.run(command, capture_output=True, check=True)
    data = json.loads(run.stdout)
    assert [len(one["ledger"]["peft"]["modules"]) for one in data["reports"]] == [8_000] * 6
    assert len(run.stdout) > 40_000_000
    assert int(run.stderr.split()[-1]) < 250


def test_without_processes_of_its_own_the_work_is_done_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guarded, "AVAILABLE", False)
    assert list(results(lambda send: send(os.getpid()), Budget())) == [os.getpid()]
