"""`batch`: attributes every line of a file once, however often its processes are stopped."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import nn
from tqdm.auto import tqdm

from captum_llm_ext.batches.journal import (
    StoredRecord,
    appending,
    finished_records,
    journal_path,
)
from captum_llm_ext.batches.lines import Line, number_of_tokens, read_lines
from captum_llm_ext.batches.output import WORK_SUFFIX, output_format, write_output
from captum_llm_ext.batches.processes import Process, this_process
from captum_llm_ext.batches.records import Explainer, Warner
from captum_llm_ext.batches.settings import batch_settings, check_settings, write_whole
from captum_llm_ext.choosing import automatic_methods
from captum_llm_ext.explaining import Layers, check_options
from captum_llm_ext.model.lock import holding

SETTINGS, REPORT, LOCK = "settings.json", "report.json", "lock"


@dataclass(frozen=True)
class BatchReport:
    """Counts of a batch: lines with a result, lines with an error, and lines left.

    The output file is written when no line is left.

    Args:
        n_results: lines with a result.
        n_errors: lines with an error record.
        n_left: lines that other processes have not finished. Default: 0.

    Raises:
        TypeError: an argument is missing.

    Example:
        >>> BatchReport(n_results=2, n_errors=1)
        BatchReport(n_results=2, n_errors=1, n_left=0)
    """

    n_results: int
    n_errors: int
    n_left: int = 0


def batch(
    model: nn.Module,
    tokenizer: Any,
    prompts: str | Path | Sequence[str | Mapping[str, Any]],
    out: str | Path,
    *,
    target: str | None = None,
    method: str | None = None,
    layers: Layers | None = None,
    by: str = "token",
    roles: Sequence[str] = ("user",),
    seed: int = 0,
    show_progress: bool = True,
    **kwargs: Any,
) -> BatchReport:
    """Attribute many prompts, and write the results in the order of the prompts.

    The call may be stopped at any moment, also by killing the process. Another call with the same
    arguments goes on where it stopped, and writes the same file as a call that was never stopped. A
    line that is malformed or fails becomes an error record. A launcher (``accelerate launch``,
    torchrun, MPI) may start several processes: each takes its share of the lines, and the last to
    end writes the file. All of them must see the folder of `out`. The number of processes may
    change between calls.

    Args:
        model: a causal language model, on the device of this process.
        tokenizer: the model's tokenizer.
        prompts: a JSONL file, or a list of its lines as strings (prompts) and dicts. A line is an
            object with "prompt"; or with "messages", as `chat_input` takes them; or with "template"
            and "values", and perhaps "baselines", as `TextTemplateInput` takes them. It may also
            have "target" (default: what the model generates), "contrast_target" and "id". Blank
            lines do not count.
        out: the file to write, ".jsonl" or ".parquet"; it must not exist. Until it is written, the
            folder ``<out>.batch`` keeps the finished records; afterwards it keeps the settings.
        target: the target of every line without its own. Default: generated.
        method: as in `explain`. Without one, `explain` chooses for each line by itself: a line with
            a "contrast_target" has "saliency". The line's result says which, as "method".
        layers: as in `explain`.
        by: what a feature of a prompt or of messages is: "token" (default), "word", "sentence",
            "line" or "paragraph"; for messages also "message".
        roles: the roles whose messages hold the features.
        seed: seed of methods and generation that draw at random; each line has its own draws.
        show_progress: show a progress bar with the time left. It counts tokens of the prompts,
            since long prompts go first and take longer.
        **kwargs: further options of `explain`, the same for every line.

    Returns:
        How many lines have a result, how many an error, and how many other processes have not
        finished.

        A line of a JSONL file is {"line": its number from 1, "id": its "id" or null, "status":
        "ok", "result": the object that ``to_json`` gives}. A line whose "status" is "error" has
        {"error": {"type": ..., "message": ...}} instead of "result". The columns of a Parquet file
        are line, id, status, input_tokens, output_tokens, layer_names (lists of strings), seq_attr,
        token_attr, output_probs, layer_seq_attr, layer_token_attr (float32, lists nested as the
        shapes say), error_type, error_message, and result, the text that ``from_json`` reads.

    Raises:
        ValueError: a batch of this name was begun with other settings, or the file exists; an
            ending, method, layer or value is unknown; there are no prompts.
        TypeError: the method does not take an option.
        ImportError: the file is ".parquet" and pyarrow (``captum-llm-ext[export]``) is missing.
        OSError: a file cannot be read or written, or another process writes the same batch.

    Warns:
        as `explain` does, with the number of the line; each kind of warning once.

    Example:
        >>> model, tokenizer = load_demo_model()
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> prompts = [{"prompt": "The capital of France is", "target": " Paris"}, {"prompt": ""}]
        >>> batch(model, tokenizer, prompts, f"{folder}/results.jsonl", show_progress=False)
        BatchReport(n_results=1, n_errors=1, n_left=0)
    """
    out, process = Path(out), this_process()
    output_format(out)
    check_options(model, tokenizer, method, layers, kwargs)
    lines = read_lines(prompts)
    explainer = Explainer(model, tokenizer, method, layers, by, roles, target, seed, kwargs)
    request = {"layers": layers, "by": by, "roles": roles, **kwargs, "method": method}
    if method is None:  # options change the choice, also those that have no other effect
        request["method"] = automatic_methods(model, layers, kwargs)
    settings = batch_settings(model, tokenizer, lines, {**request, "target": target, "seed": seed})
    files = _Files(out)
    with files.of_process(process, settings) as finished:
        if finished is None:
            return files.report()
        _explain_share(explainer, lines, process, finished, files, show_progress)
    return files.assemble([line.number for line in lines])


def _explain_share(
    explainer: Explainer,
    lines: Sequence[Line],
    process: Process,
    finished: Container[int],
    files: _Files,
    show_progress: bool,
) -> None:
    """Write the records of this process's lines, the longest first, equal lengths together."""
    tokens = {
        line.number: number_of_tokens(line, explainer.tokenizer, explainer.by, explainer.roles)
        for line in lines
    }
    share = process.share(sorted(lines, key=lambda line: -tokens[line.number]))
    left = [line for line in share if line.number not in finished]
    warner, hidden = Warner(), not show_progress or process.index > 0
    total = sum(tokens[line.number] for line in share)
    start = total - sum(tokens[line.number] for line in left)
    with (
        appending(journal_path(files.folder, process.index)) as append,
        tqdm(total=total, initial=start, unit="token", disable=hidden) as bar,
    ):
        for number, line in enumerate(left, len(share) - len(left) + 1):
            bar.set_description(f"prompt {number} of {len(share)}", refresh=False)
            # Warning filters and random generators are the whole process's.
            with holding(explainer.model, warnings, random), warner.of_line(line.number):
                record = explainer.record(line)
            append(record)
            bar.update(tokens[line.number])


class _Files:
    """The output file, and the folder beside it that holds the journals, settings and locks."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = out.with_name(out.name + WORK_SUFFIX)
        # Held while files are made, listed or removed, so that no process sees half of it.
        self._lock = FileLock(self.folder / LOCK)

    @contextmanager
    def of_process(
        self, process: Process, settings: Mapping[str, Any]
    ) -> Iterator[dict[int, StoredRecord] | None]:
        """The finished records, or None where the output file is there.

        No other process can have the same index meanwhile.
        """
        self.folder.mkdir(exist_ok=True)
        index_lock = FileLock(self.folder / f"{process.index}.lock", timeout=0)
        with self._lock:
            check_settings(self.folder / SETTINGS, settings, self.out)
            finished = None if self.out.exists() else finished_records(self.folder)
            if finished is not None:
                _acquire(index_lock, self.out)
        try:
            yield finished
        finally:
            index_lock.release()

    def assemble(self, numbers: Sequence[int]) -> BatchReport:
        """Write the output file if every line is finished and no other process has written it."""
        with self._lock:
            if self.out.exists():
                return self.report()
            finished = finished_records(self.folder)
            records = [finished[number] for number in numbers if number in finished]
            n_errors = sum(record.is_error for record in records)
            report = BatchReport(len(records) - n_errors, n_errors, len(numbers) - len(records))
            if report.n_left == 0:
                write_whole(self.folder / REPORT, json.dumps(asdict(report)).encode())
                write_output(self.out, self.folder, records)
                self._clear()
            return report

    def report(self) -> BatchReport:
        """The report of a finished batch."""
        with self._lock:
            self._clear()  # a process may have been killed between the last two steps
            return BatchReport(**json.loads((self.folder / REPORT).read_bytes()))

    def _clear(self) -> None:
        for pattern in ("*.jsonl", "*.lock", "*.tmp"):
            for path in self.folder.glob(pattern):
                path.unlink(missing_ok=True)


def _acquire(lock: FileLock, out: Path) -> None:
    try:
        lock.acquire()
    except Timeout as error:
        raise OSError(f"another process is writing {out}: wait until it has ended") from error
