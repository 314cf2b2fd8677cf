"""`batch` stopped or torn anywhere, in any number of processes, writes the same file."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from captum_llm_ext import cli
from captum_llm_ext.batches.records import Explainer
from tests.batches.cases import MALFORMED, journal_lines, many_lines, records, run, write_lines
from tests.models.families import tiny_model, tiny_tokenizer

FEW = [
    {"prompt": prompt, "target": " golf"}
    for prompt in ("Palm Coast", "", "Dave lives in Palm Coast", "Dave lives")
]
ROOT = Path(__file__).parents[2]
KILLS = 10


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """300 lines, 5 of them malformed, and the file of a run in one go."""
    folder = tmp_path_factory.mktemp("many")
    prompts = write_lines(folder / "prompts.jsonl", many_lines(300, MALFORMED))
    report = run(prompts, folder / "expected.jsonl")
    assert (report.n_results, report.n_errors) == (295, 5)
    return prompts, (folder / "expected.jsonl").read_bytes()


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def forks():
    """Processes that start at once, since their server has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.batches.cases"])
    return context


class Killed(BaseException):
    """Stands for the end of the process: no handler catches it."""


def test_a_stopped_batch_goes_on_where_it_was(tmp_path, monkeypatch):
    run(FEW, tmp_path / "expected.jsonl")
    out, work = tmp_path / "results.jsonl", Explainer.record
    lines: list[int] = []

    def record(explainer, line):
        lines.append(line.number)
        if len(lines) == 3:
            raise Killed
        return work(explainer, line)

    monkeypatch.setattr(Explainer, "record", record)
    with pytest.raises(Killed):
        run(FEW, out)
    assert not out.exists()
    run(FEW, out)
    assert out.read_bytes() == (tmp_path / "expected.jsonl").read_bytes()
    assert lines == [3, 1, 4, 4, 2]  # the longest prompt first; line 4 was stopped, so done again


def kill_after(process, out: Path, lines: int, delay: float) -> None:
    """SIGKILL once the journal has so many lines, and a moment later."""
    while process.is_alive() and journal_lines(out) < lines:
        process.join(0.001)
    process.join(delay)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_killed_at_ten_moments(many, forks, tmp_path, monkeypatch):
    prompts, expected = many
    out, draws = tmp_path / "results.jsonl", random.Random(0)
    for lines in [0, *sorted(draws.sample(range(1, 280), KILLS - 1))]:
        process = forks.Process(target=run, args=(prompts, out))
        process.start()
        kill_after(process, out, lines, draws.uniform(0, 0.02))
        assert not out.exists()
        assert journal_lines(out) >= lines
    n_recorded = journal_lines(out)
    appended: list[int] = []
    monkeypatch.setattr(os, "fsync", appended.append)
    report = run(prompts, out)
    assert (report.n_results, report.n_errors, report.n_left) == (295, 5, 0)
    assert out.read_bytes() == expected
    files_beside_the_journal = 2  # the report and the results
    assert len(appended) == 300 - n_recorded + files_beside_the_journal  # nothing is computed twice


def command(prompts: Path, out: Path, model: Path) -> list[str]:
    return ["batch", str(prompts), "--out", str(out), "--model", str(model)]


def without_names(content: bytes) -> list[dict[str, Any]]:
    """Records without the names of model and tokenizer, which those of a folder have."""
    records = [json.loads(line) for line in content.splitlines()]
    for record in records:
        for name in ("model", "tokenizer") if "result" in record else ():
            record["result"]["provenance"].pop(name, None)
    return records


def test_the_command_line_killed(model_folder, tmp_path):
    prompts = write_lines(tmp_path / "prompts.jsonl", many_lines(60, MALFORMED))
    out = tmp_path / "results.jsonl"
    arguments = command(prompts, out, model_folder)
    process = subprocess.Popen([sys.executable, "-m", "captum_llm_ext", *arguments], cwd=ROOT)
    while process.poll() is None and journal_lines(out) < 5:
        pass
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert cli.main(arguments) == 0
    run(prompts, tmp_path / "expected.jsonl")
    assert without_names(out.read_bytes()) == without_names(
        (tmp_path / "expected.jsonl").read_bytes()
    )


def test_two_processes_of_accelerate(many, model_folder, tmp_path):
    pytest.importorskip("accelerate")
    prompts, expected = many
    out = tmp_path / "results.jsonl"
    launch = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1"
    launch += " --mixed_precision no --dynamo_backend no --main_process_port 0 -m captum_llm_ext"
    done = subprocess.run(
        [sys.executable, *launch.split(), *command(prompts, out, model_folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert f"wrote {out}: 295 results, 5 errors" in done.stderr
    assert without_names(out.read_bytes()) == without_names(expected)


@pytest.mark.parametrize("counts", [(2,), (3, 1), (2, 3, 1), (7,)])
def test_the_number_of_processes_may_change(tmp_path, monkeypatch, counts):
    """The first process of each number ends, the others are lost; the last number is complete."""
    lines = many_lines(12, MALFORMED[:2])
    prompts = write_lines(tmp_path / "prompts.jsonl", lines)
    run(prompts, tmp_path / "expected.jsonl")
    out = tmp_path / "results.jsonl"
    for count in counts:
        monkeypatch.setenv("WORLD_SIZE", str(count))
        for index in range(count if count == counts[-1] else 1):
            monkeypatch.setenv("RANK", str(index))
            assert not out.exists()
            report = run(prompts, out)
    assert (report.n_results, report.n_errors, report.n_left) == (10, 2, 0)
    assert out.read_bytes() == (tmp_path / "expected.jsonl").read_bytes()


STEPS = [(os, "fsync"), (os, "replace"), (Path, "unlink"), (Path, "mkdir")]


def test_killed_at_every_step_of_a_file(tmp_path, monkeypatch):
    """The process ends before or after each sync, move or removal of a file."""
    run(FEW, tmp_path / "expected.jsonl")
    expected, moment, finished = (tmp_path / "expected.jsonl").read_bytes(), 0, False
    while not finished:
        out, calls = tmp_path / f"{moment}.jsonl", iter(range(10**6))
        with monkeypatch.context() as patched:
            for owner, name in STEPS:
                patched.setattr(owner, name, stopping(getattr(owner, name), calls, moment))
            try:
                run(FEW, out)
                finished = True
            except Killed:
                pass
        assert not out.exists() or out.read_bytes() == expected  # whole or not at all
        report = run(FEW, out)
        assert (report.n_results, report.n_errors) == (3, 1)
        assert out.read_bytes() == expected
        moment += 1
    assert moment > 2 * len(FEW)


def stopping(function, calls, moment):
    def stop(*args, **kwargs):
        if next(calls) == moment:
            raise Killed
        result = function(*args, **kwargs)
        if next(calls) == moment:
            raise Killed
        return result

    return stop


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """The journal and settings that the first of two processes left, and the finished file."""
    folder = tmp_path_factory.mktemp("half")
    run(FEW, folder / "expected.jsonl")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("WORLD_SIZE", "2")
        assert run(FEW, folder / "half.jsonl").n_left == 2
    (journal,) = (folder / "half.jsonl.batch").glob("*.jsonl")
    stored = (folder / "half.jsonl.batch" / "settings.json").read_bytes()
    return journal.read_bytes(), stored, (folder / "expected.jsonl").read_bytes()


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), index=st.integers(0, 2))
def test_a_journal_torn_at_any_byte(half, data, index):
    """The journal of any process is cut, and a failing disk puts junk after it."""
    journal, stored, expected = half
    cut = data.draw(st.integers(0, len(journal)), label="cut")
    junk = data.draw(st.sampled_from([b"", b"\0" * 9, b"\0\n", b"{}\n", b"3\n", b"\xff\n{"]))
    with tempfile.TemporaryDirectory() as name:
        out, folder = Path(name, "results.jsonl"), Path(name, "results.jsonl.batch")
        folder.mkdir()
        (folder / "settings.json").write_bytes(stored)
        (folder / f"{index}.jsonl").write_bytes(journal[:cut] + junk)
        assert run(FEW, out).n_left == 0
        assert out.read_bytes() == expected


def test_damaged_settings(tmp_path):
    out = tmp_path / "results.jsonl"
    run(FEW[:1], out)
    (tmp_path / "results.jsonl.batch" / "settings.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        run(FEW[:1], out)
    assert records(out)[0]["status"] == "ok"
