"""`batch`: every line of a file attributed once, whatever stops the processes in between."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import nn
from tqdm.auto import tqdm

from captum_llm_ext.batches.journal import Place, appending, finished, journal_path
from captum_llm_ext.batches.lines import Line, number_of_tokens, read_lines
from captum_llm_ext.batches.output import output_format, write_output
from captum_llm_ext.batches.processes import Process, this_process
from captum_llm_ext.batches.records import Explainer, Warner
from captum_llm_ext.batches.settings import batch_settings, check_settings, write_whole
from captum_llm_ext.explaining import Layers, check_options

WORK_SUFFIX = ".batch"
SETTINGS, REPORT, LOCK = "settings.json", "report.json", "lock"


@dataclass(frozen=True)
class BatchReport:
    """How far a batch is: lines with a result, with an error, and left to other processes.

    The file is there once nothing is left.

    Args:
        n_results: lines with a result.
        n_errors: lines with an error record.
        n_left: lines left to processes that have not finished. Default: 0.

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
    method: str = "saliency",
    layers: Layers | None = None,
    by: str = "token",
    roles: Sequence[str] = ("user",),
    seed: int = 0,
    show_progress: bool = True,
    **kwargs: Any,
) -> BatchReport:
    """Attribute many prompts, and write the results in the order of the prompts.

    May be stopped at any moment, also by killing the process: called again with the same arguments
    it goes on where it was, and the file is the same as without the stop. A line that is malformed
    or fails becomes an error record. Started as several processes by a launcher (``accelerate
    launch``, torchrun, MPI) each takes its share of the lines, and whichever ends last writes the
    file; the folder must be one that all see, and the number of processes may change on the way.

    Args:
        model: a causal language model, on the device of this process.
        tokenizer: the model's tokenizer.
        prompts: a JSONL file, or a list of its lines as strings (prompts) and dicts. A line is an
            object with "prompt"; or "messages", as `chat_input` takes them; or "template" and
            "values", perhaps "baselines", as `TextTemplateInput`. Beside that "target" (default:
            what the model generates), "contrast_target" and "id". Blank lines do not count.
        out: the file to write, ".jsonl" or ".parquet", which must not be there. What is finished
            is kept in the folder ``<out>.batch`` until then; its settings stay there afterwards.
        target: of lines that have none. Default: generated.
        method: as of `explain`.
        layers: as of `explain`.
        by: what a feature of a prompt or of messages is: "token" (default), "word", "sentence",
            "line", "paragraph", or of messages "message".
        roles: whose messages hold the features.
        seed: of methods and generation that draw at random; each line has draws of its own.
        show_progress: show a progress bar with the time left, in tokens of the prompts, since long
            prompts go first and take longer.
        **kwargs: further options of `explain`, the same for every line.

    Returns:
        How many lines have a result and how many an error, and how many are left to processes
        that have not finished.

        A line of a JSONL file is {"line": its number from 1, "id": its "id" or null, "status":
        "ok", "result": the object that ``to_json`` gives}, or with "status" "error" {"error":
        {"type": ..., "message": ...}} instead of "result". Columns of a Parquet file: line, id,
        status, input_tokens, output_tokens, layer_names (lists of strings), seq_attr, token_attr,
        output_probs, layer_seq_attr, layer_token_attr (float32, lists nested as the shapes say),
        error_type, error_message, and result, the text that ``from_json`` reads.

    Raises:
        ValueError: another batch with other settings was begun under this name, or the file is
            there already; an unknown ending, method, layer or value; no prompts.
        TypeError: an option that the method does not take.
        ImportError: Parquet without pyarrow (``captum-llm-ext[export]``).
        OSError: a file cannot be read or written, or another process writes the same batch.

    Warns:
        as `explain`, with the number of the line; of each kind of warning once.

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
    request = {"method": method, "layers": layers, "by": by, "roles": roles} | kwargs
    settings = batch_settings(model, tokenizer, lines, {**request, "target": target, "seed": seed})
    files = _Files(out)
    with files.of_process(process, settings) as done:
        if done is None:
            return files.report()
        _explain_share(explainer, lines, process, done, files, show_progress)
    return files.assemble([line.number for line in lines])


def _explain_share(
    explainer: Explainer,
    lines: Sequence[Line],
    process: Process,
    done: Mapping[int, Place],
    files: _Files,
    show_progress: bool,
) -> None:
    """Write the records of this process's lines, the longest first, equal lengths together."""
    tokens = {
        line.number: number_of_tokens(line, explainer.tokenizer, explainer.by, explainer.roles)
        for line in lines
    }
    by_length = sorted(lines, key=lambda line: -tokens[line.number])
    share = process.share(by_length)
    left = [line for line in share if line.number not in done]
    warner, hidden = Warner(), not show_progress or process.index > 0
    total = sum(tokens[line.number] for line in share)
    start = total - sum(tokens[line.number] for line in left)
    with (
        appending(journal_path(files.folder, process.index)) as append,
        tqdm(total=total, initial=start, unit="token", disable=hidden) as bar,
    ):
        for place, line in enumerate(left, len(share) - len(left) + 1):
            bar.set_description(f"prompt {place} of {len(share)}", refresh=False)
            with warner.of_line(line.number):
                record = explainer.record(line)
            append(record)
            bar.update(tokens[line.number])


class _Files:
    """The finished file and the folder beside it with what is known before."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = out.with_name(out.name + WORK_SUFFIX)
        # Held while files appear, are looked for or go, so that no process sees half of it.
        self._lock = FileLock(self.folder / LOCK)

    @contextmanager
    def of_process(
        self, process: Process, settings: Mapping[str, Any]
    ) -> Iterator[dict[int, Place] | None]:
        """The records finished so far, or None if the file is; no other process has this index."""
        self.folder.mkdir(exist_ok=True)
        own = FileLock(self.folder / f"{process.index}.lock", timeout=0)
        with self._lock:
            check_settings(self.folder / SETTINGS, settings, self.out)
            done = None if self.out.exists() else finished(self.folder)
            if done is not None:
                _acquire(own, self.out)
        try:
            yield done
        finally:
            own.release()

    def assemble(self, numbers: Sequence[int]) -> BatchReport:
        """Write the file where every line is finished and no other process was faster."""
        with self._lock:
            if self.out.exists():
                return self.report()
            found = finished(self.folder)
            places = [found[number] for number in numbers if number in found]
            n_errors = sum(place.is_error for place in places)
            report = BatchReport(len(places) - n_errors, n_errors, len(numbers) - len(places))
            if report.n_left == 0:
                write_whole(self.folder / REPORT, json.dumps(asdict(report)).encode())
                write_output(self.out, self.folder, places)
                self._clear()
            return report

    def report(self) -> BatchReport:
        """The report of a finished batch."""
        with self._lock:
            self._clear()  # what was left by a process killed between the last two steps
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
