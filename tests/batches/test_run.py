"""`batch`: every line has the result of `explain`, in order, and bad lines are records too."""

from __future__ import annotations

import importlib.util
import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from filelock import FileLock

from captum_llm_ext import LLMAttributionResult, TextTemplateInput, explain, read_batch
from captum_llm_ext.batches import records as batch_records
from captum_llm_ext.batches.processes import Process, this_process
from tests.batches.cases import MALFORMED, many_lines, records, run, write_lines
from tests.models.families import tiny_model, tiny_tokenizer

SAMPLING = {
    "gradshap": {"n_samples": 3, "stdevs": 0.1},
    "shapley_sampling": {"n_samples": 3},
    "kernelshap": {"n_samples": 8},
}


def explained(prompt, target, *args, **kwargs):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    result = explain(model, tokenizer, prompt, target, *args, **kwargs)
    assert result.provenance is not None
    result.provenance = replace(result.provenance, seconds=None)  # it is not in the record
    return json.loads(result.to_json())


def test_two_prompts_give_two_results_in_their_order(tmp_path):
    out = tmp_path / "results.jsonl"
    report = run(["Palm Coast", "Dave lives"], out, target=" golf")
    assert (report.n_results, report.n_errors, report.n_left) == (2, 0, 0)
    assert [record["result"] for record in records(out)] == [
        explained("Palm Coast", " golf"),
        explained("Dave lives", " golf"),
    ]


@pytest.mark.parametrize(
    ("method", "kwargs"),
    [
        ("saliency", {}),
        ("gradxact", {"layers": ["model.layers.*.mlp"], "include_per_token_attr": False}),
        ("ablation", {"attr_target": "prob"}),
        ("attention", {"heads": [1], "reduction": "max"}),
    ],
)
def test_every_line_has_the_result_of_explain(tmp_path, method, kwargs):
    lines = many_lines(11, MALFORMED)
    out = tmp_path / "results.jsonl"
    report = run(write_lines(tmp_path / "prompts.jsonl", lines), out, method=method, **kwargs)
    assert (report.n_results, report.n_errors, report.n_left) == (6, 5, 0)
    assert [record["line"] for record in records(out)] == list(range(1, 12))
    for line, record in zip(lines, records(out), strict=True):
        if line in MALFORMED:
            assert set(record) == {"line", "id", "status", "error"}
            assert record["status"] == "error"
        else:
            fields = json.loads(line)
            expected = explained(fields["prompt"], fields["target"], method, **kwargs)
            assert record == {
                "line": record["line"],
                "id": fields["id"],
                "status": "ok",
                "result": expected,
            }


def test_kinds_of_lines(tmp_path):
    """Prompts, templates, contrasts and blank lines; this tokenizer has no chat template."""
    template = {"template": "{} lives in {}", "values": ["Dave", "Palm Coast"], "target": " golf"}
    lines = [
        {"prompt": "Palm Coast"},
        {**template, "baselines": ["He", "a town"]},
        {"prompt": "Palm Coast", "target": " golf", "contrast_target": " hiking", "id": 7},
        {"prompt": "Palm Coast", "target": None, "id": None},
    ]
    texts = [json.dumps(line).encode() for line in lines]
    path = write_lines(tmp_path / "prompts.jsonl", [b"\xef\xbb\xbf" + texts[0], b"  ", *texts[1:]])
    gen_args = {"max_new_tokens": 2, "do_sample": False}
    run(path, tmp_path / "a.jsonl", gen_args=gen_args, method="gradxact")
    first = records(tmp_path / "a.jsonl")
    assert [(record["line"], record["id"]) for record in first] == [
        (1, None),
        (3, None),
        (4, 7),
        (5, None),
    ]
    inp = TextTemplateInput("{} lives in {}", ["Dave", "Palm Coast"], ["He", "a town"])
    expected = [
        explained("Palm Coast", None, "gradxact", gen_args=gen_args),
        explained(inp, " golf", "gradxact"),
        explained("Palm Coast", " golf", "gradxact", contrast_target=" hiking"),
        explained("Palm Coast", None, "gradxact", gen_args=gen_args),
    ]
    assert [record["result"] for record in first] == expected
    again = tmp_path / "b.jsonl"  # the same as a list, whose strings are prompts
    run(["Palm Coast", *lines[1:]], again, gen_args=gen_args, method="gradxact")
    assert [record["result"] for record in records(again)] == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"[]", "expected a JSON object"),
        (b"nonsense", "Expecting value"),
        (b"[" * 100_000, "recursion"),
        (b"{}", "expected one of prompt, messages, template; got none"),
        (b'{"prompt": "a", "messages": []}', "got prompt and messages"),
        (b'{"prompt": "a", "traget": "b"}', "unknown field 'traget'; the fields are prompt, "),
        (b'{"prompt": "\\ud800"}', "prompt: expected a string, got '\\ud800'"),
        (b'{"prompt": "a", "id": {}}', "id: expected a string or an integer"),
        (b'{"template": "{}"}', "a template needs values"),
        (b'{"prompt": "a", "values": ["b"]}', "values need a template"),
        (b'{"template": "{}", "values": [3]}', "values: expected a list of strings"),
        (b'{"messages": [{"role": "user"}]}', "'content'"),
        (b'{"messages": [3]}', "messages: expected a list of objects"),
        (b'{"prompt": "Palm", "target": ""}', "target"),
    ],
)
def test_what_is_wrong_with_a_line(tmp_path, line, message):
    good = b'{"prompt": "Palm Coast", "target": " golf"}'
    out = tmp_path / "results.parquet"
    report = run(write_lines(tmp_path / "prompts.jsonl", [line, good]), out)
    assert (report.n_results, report.n_errors) == (1, 1)
    out = tmp_path / "results.jsonl"
    run(tmp_path / "prompts.jsonl", out)
    bad, fine = records(out)
    assert message in bad["error"]["message"]
    assert fine["status"] == "ok"


@pytest.mark.parametrize("layers", [None, ["q_proj"]])
def test_parquet_holds_the_same(tmp_path, layers):
    parquet = pytest.importorskip("pyarrow.parquet")
    lines = [*many_lines(6, MALFORMED[:1]), b'{"prompt": "", "id": "\\ud800"}']
    path = write_lines(tmp_path / "prompts.jsonl", lines)
    for ending in ("jsonl", "parquet"):
        run(path, tmp_path / f"results.{ending}", layers=layers)
    rows = parquet.read_table(tmp_path / "results.parquet").to_pylist()
    for record, row in zip(records(tmp_path / "results.jsonl"), rows, strict=True):
        assert (row["line"], row["status"]) == (record["line"], record["status"])
        if row["status"] == "error":
            assert (row["error_type"], row["error_message"]) == tuple(record["error"].values())
            assert row["seq_attr"] is row["result"] is None
            continue
        assert row["id"] == record["id"]
        assert json.loads(row["result"]) == record["result"]
        result = LLMAttributionResult.from_json(row["result"])
        for name in ("seq_attr", "token_attr", *(["layer_token_attr"] if layers else [])):
            assert np.array_equal(np.array(row[name], np.float32), getattr(result, name).numpy())
        assert row["output_tokens"] == result.output_tokens
        assert row["layer_names"] == (result.layer_names if layers else None)
    assert rows[-1]["id"] == "?"  # half a surrogate pair, which UTF-8 cannot hold


@pytest.mark.parametrize("method", SAMPLING)
def test_draws_do_not_depend_on_the_order(tmp_path, monkeypatch, method):
    """The seed and the number of a line alone decide its draws."""
    lines = [json.loads(line) for line in many_lines(6)]
    torch.manual_seed(1)
    run(lines, tmp_path / "a.jsonl", method=method, **SAMPLING[method])
    before = torch.get_rng_state()
    for index in (1, 0):
        monkeypatch.setenv("RANK", str(index))
        monkeypatch.setenv("WORLD_SIZE", "2")
        run(lines, tmp_path / "b.jsonl", method=method, **SAMPLING[method])
    assert torch.equal(torch.get_rng_state(), before)
    run(lines, tmp_path / "c.jsonl", method=method, seed=1, **SAMPLING[method])
    a, b = ((tmp_path / f"{name}.jsonl").read_bytes() for name in "ab")
    assert a == b
    assert not (tmp_path / "c.jsonl").exists()  # still as the first of two processes


def test_shares_of_processes():
    items = list(range(10))
    shares = [Process(index, 3).share(items) for index in range(3)]
    assert sorted(item for share in shares for item in share) == items
    assert this_process({}) == Process(0, 1, 0)
    launched = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "PMI_RANK": "9"}
    assert this_process(launched) == Process(5, 8, 1)
    assert this_process({"PMI_RANK": "1", "PMI_SIZE": "2"}) == Process(1, 2, 0)
    with pytest.raises(ValueError, match="process index from 0 to 0, got 3"):
        this_process({"RANK": "3"})


CHANGED = {
    "method": {"method": "gradxact"},
    "layers": {"layers": "q_proj"},
    "norm": {"norm": "l2"},
    "by": {"by": "word"},
    "target": {"target": " Palm"},
    "seed": {"seed": 1},
    "gen_args": {"gen_args": {"max_new_tokens": 3}},
}


@pytest.mark.parametrize("name", CHANGED)
@pytest.mark.parametrize("is_finished", [True, False])
def test_other_settings_are_refused(tmp_path, monkeypatch, name, is_finished):
    out = tmp_path / "results.jsonl"
    if not is_finished:
        monkeypatch.setenv("WORLD_SIZE", "2")
    run(["Palm Coast"] * 2, out)
    assert out.exists() == is_finished
    with pytest.raises(ValueError, match=rf"other settings \(.*{name}: .* then, .* now"):
        run(["Palm Coast"] * 2, out, **CHANGED[name])


def test_other_prompts_and_models_are_refused(tmp_path):
    out = tmp_path / "results.jsonl"
    run(["Palm Coast"], out)
    with pytest.raises(ValueError, match=r"\(prompts: "):
        run(["Palm Coast "], out)
    model = tiny_model("llama", fresh=True)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] += 1e-3
    with pytest.raises(ValueError, match=r"\(model: "):
        run(["Palm Coast"], out, model)


def test_options_without_effect_on_results_may_change(tmp_path):
    out = tmp_path / "results.jsonl"
    report = run(["Palm Coast"], out, internal_batch_size=2)
    assert run(["Palm Coast"], out, internal_batch_size=4, show_progress=True) == report
    assert run(["Palm Coast"], out) == report
    with pytest.raises(ValueError, match=r'settings \(method: \["flow", "saliency"\] then, \["sal'):
        run(["Palm Coast"], out, attr_target="logit")


def test_each_line_has_the_method_that_its_options_allow(tmp_path, monkeypatch):
    lines = [
        {"prompt": "Palm Coast", "target": " golf"},
        {"prompt": "Palm Coast", "target": " golf", "contrast_target": " hiking"},
    ]
    out = tmp_path / "results.jsonl"
    run(lines, out)
    assert [record["result"]["provenance"]["method"] for record in records(out)] == [
        "flow",
        "saliency",
    ]
    monkeypatch.setenv("WORLD_SIZE", "2")  # another process has the other line
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        run(lines, tmp_path / "resumed.jsonl")
    assert (tmp_path / "resumed.jsonl").read_bytes() == out.read_bytes()


def test_a_finished_batch_is_left_alone(tmp_path):
    out = tmp_path / "results.jsonl"
    report = run(["Palm Coast", ""], out)
    before = out.stat()
    assert run(["Palm Coast", ""], out) == report
    assert (out.stat().st_ino, out.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    left = {path.name for path in (tmp_path / "results.jsonl.batch").iterdir()}
    assert left == {"settings.json", "report.json", "lock"}


def test_a_file_that_is_not_from_a_batch_is_not_overwritten(tmp_path):
    out = tmp_path / "results.jsonl"
    out.write_text("mine")
    with pytest.raises(ValueError, match="exists and is not from a batch"):
        run(["Palm Coast"], out)
    assert out.read_text() == "mine"


def test_the_same_batch_twice_at_once(tmp_path):
    out = tmp_path / "results.jsonl"
    folder = tmp_path / "results.jsonl.batch"
    folder.mkdir()
    with FileLock(folder / "0.lock"), pytest.raises(OSError, match="another process is writing"):
        run(["Palm Coast"], out)
    assert run(["Palm Coast"], out).n_results == 1


def test_a_broken_gpu_stops_the_batch(tmp_path, monkeypatch):
    """Every later line would fail as well: nothing is recorded, and another run goes on."""

    def fail(*args, **kwargs):
        raise RuntimeError("CUDA error: device-side assert triggered")

    out = tmp_path / "results.jsonl"
    with monkeypatch.context() as patched:
        patched.setattr(batch_records, "explain", fail)
        with pytest.raises(RuntimeError, match="device-side"):
            run(["Palm Coast"], out)
    assert run(["Palm Coast"], out).n_results == 1


def test_running_out_of_memory_is_a_record(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(batch_records, "explain", fail)
    assert run(["Palm Coast"], tmp_path / "results.jsonl").n_errors == 1


def test_each_kind_of_warning_once(tmp_path):
    lines = [json.loads(line) for line in many_lines(6)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(lines, tmp_path / "results.jsonl", method="ig", n_steps=1)
    (message,) = [str(w.message) for w in caught if "have not converged" in str(w.message)]
    assert message.startswith("line 6: ")  # the longest prompt goes first


def test_progress_shows_the_time_left(tmp_path, capsys):
    run(["Palm Coast", "Palm", ""], tmp_path / "results.jsonl", show_progress=True)
    err = capsys.readouterr().err
    assert "prompt 3 of 3: 100%" in err
    assert "<00:00" in err


@pytest.mark.parametrize(
    ("out", "kwargs", "error", "message"),
    [
        ("results.csv", {}, ValueError, "ends in .jsonl or .parquet"),
        ("no/such/results.jsonl", {}, ValueError, "there is no folder"),
        ("a.jsonl", {"method": "nonsense"}, ValueError, "one of saliency, ig"),
        ("a.jsonl", {"n_steps": 3}, TypeError, "saliency does not take n_steps"),
        ("a.jsonl", {"method": "ig", "n_steps": 0}, ValueError, "n_steps must be"),
        ("a.jsonl", {"layers": "nothing"}, ValueError, "nothing"),
        ("a.jsonl", {"prompts": []}, ValueError, "at least one prompt"),
        ("a.jsonl", {"prompts": [3]}, TypeError, "got int in it"),
        ("a.jsonl", {"prompts": "no-such-file"}, OSError, "no-such-file"),
    ],
)
def test_what_is_wrong_with_the_request(tmp_path, out, kwargs, error, message):
    with pytest.raises(error, match=message):
        run(kwargs.pop("prompts", ["Palm Coast"]), tmp_path / out, **kwargs)
    assert not list(tmp_path.iterdir())


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"captum-llm-ext\[export\]"):
        run(["Palm Coast"], tmp_path / "results.parquet")


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_finished_file_is_read_as_results_and_errors(tmp_path, ending):
    if ending == "parquet":
        pytest.importorskip("pyarrow")
    out = tmp_path / f"results.{ending}"
    run([{"prompt": "Palm", "target": " golf", "id": "a"}, {"prompt": ""}], out, method="saliency")
    one, other = read_batch(out)
    assert (one.line, one.id, one.is_error, one.error_type) == (1, "a", False, None)
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    assert one.result == explain(model, tokenizer, "Palm", " golf", "saliency")
    assert one.result.provenance.method == "saliency"
    assert one.result.provenance.seconds is None
    assert (other.line, other.result, other.error_type) == (2, None, "ValueError")
    assert "at least one character" in other.error_message


def test_what_is_not_a_finished_batch_is_refused(tmp_path):
    (tmp_path / "begun.jsonl.batch").mkdir()
    with pytest.raises(ValueError, match="not finished"):
        read_batch(tmp_path / "begun.jsonl")
    with pytest.raises(ValueError, match="ends in"):
        read_batch(tmp_path / "results.csv")
    (tmp_path / "other.jsonl").write_text('{"prompt": "the cat"}')
    with pytest.raises(ValueError, match="that batch wrote"):
        list(read_batch(tmp_path / "other.jsonl"))
