"""Inputs and outputs that are Parquet, or directories: as one JSONL file of the same lines would be, and as safe."""

import builtins
import json
import os
import signal
import time
from dataclasses import replace

import pytest
from batch_fake import records_of, run_job, run_with_workers
from hypothesis import given
from hypothesis import strategies as st
from test_batch import many, put, records, start

from jaxkv import SamplingParams
from jaxkv.batch.job import BatchJob
from jaxkv.batch.lines import Broken, Job, Place, read_line
from jaxkv.batch.parquet import rows
from jaxkv.batch.sources import source_of
from jaxkv.cli.main import main

pytestmark = pytest.mark.once

CHAT = [{"role": "system", "content": "S"}, {"role": "user", "content": "U", "name": "N"}]
ASKED = [
    {"id": "a", "prompt": "one", "seed": 5, "temperature": 0.5},
    {"id": "b", "messages": CHAT, "max_tokens": 4},
    {"id": "c", "prompt": "three", "stop": ["x", "y"], "logit_bias": {"5": -1.0}, "logprobs": True},
    {"id": "d", "prompt": "far too long"},
    {"id": "e", "prompt": "fine", "max_tokens": 0},
    {"id": None, "prompt": "has no id", "ratio": 8.0},
]
OF_A_LINE = {"line", "file", "digest"}
"""What a record has of the place and the words of its line, not of its answer."""


@pytest.fixture(scope="module")
def arrow():
    return pytest.importorskip("pyarrow.parquet")


def put_rows(path, lines):
    """As a pandas frame of these lines would be written: a column for each key of any, null where a line has none."""
    pyarrow = pytest.importorskip("pyarrow.parquet")
    names = {name: None for line in lines for name in line}
    table = pytest.importorskip("pyarrow").Table.from_pylist([dict.fromkeys(names) | line for line in lines])
    pyarrow.write_table(table, path, row_group_size=3, write_page_checksum=True)
    return path


def answers(made):
    return {r["id"]: {name: value for name, value in r.items() if name not in OF_A_LINE} for r in made}


def split(tmp_path, lines, at=(0, 2, 5), write=put, suffix=".jsonl"):
    """A directory of three files with these lines."""
    folder = tmp_path / "in"
    folder.mkdir()
    for number, (begin, end) in enumerate(zip(at, [*at[1:], len(lines)], strict=True)):
        path = folder / f"part-{number}{suffix}"
        write(path, *lines[begin:end]) if write is put else write(path, lines[begin:end])
    return folder


def test_a_directory_is_answered_as_its_files_one_after_the_other_would_be(tmp_path):
    one = put(tmp_path / "one.jsonl", *ASKED[:-1])
    folder = split(tmp_path, ASKED[:-1], at=(0, 2, 4))
    (folder / "README.md").write_text("What it is")
    (folder / ".part-9.jsonl").write_text("left by somebody")
    assert run_job(one, tmp_path / "one.out.jsonl") == run_job(folder, tmp_path / "all.out.jsonl") == 1
    made = records(tmp_path / "all.out.jsonl")
    assert answers(made) == answers(records(tmp_path / "one.out.jsonl"))
    assert sorted((r["file"], r["line"], r["id"]) for r in made) == [
        ("part-0.jsonl", 1, "a"),
        ("part-0.jsonl", 2, "b"),
        ("part-1.jsonl", 1, "c"),
        ("part-1.jsonl", 2, "d"),
        ("part-2.jsonl", 1, "e"),
    ]


def test_a_file_may_be_added_and_the_job_goes_on(tmp_path, capsys):
    folder, output = split(tmp_path, ASKED[:3], at=(0, 1, 2)), tmp_path / "out.jsonl"
    assert run_job(folder, output) == 0
    put(folder / "part-00.jsonl", {"prompt": "new"}, {"prompt": "too"})
    assert run_job(folder, output) == 0
    assert "2 answered, 0 failed, 3 skipped" in capsys.readouterr().err
    assert {r["id"] for r in records(output)} == {"a", "b", "c", "part-00.jsonl:1", "part-00.jsonl:2"}
    (folder / "part-1.jsonl").unlink()
    with pytest.raises(ValueError, match=r"has a record of part-1.jsonl line 1, but .*in has no such line"):
        run_job(folder, output)
    put(folder / "part-1.jsonl", {"id": "b", "prompt": "other"})
    with pytest.raises(ValueError, match=r"part-1.jsonl line 1 of .*in is not what"):
        run_job(folder, output)


def test_what_is_wrong_is_said_with_its_file(tmp_path, capsys):
    folder, output = tmp_path / "in", tmp_path / "out.jsonl"
    folder.mkdir()
    put(folder / "a.jsonl", {"id": "x", "prompt": "first"}, b"", {"id": "y", "prompt": "second"})
    put(folder / "b.jsonl", {"prompt": "fine"}, {"id": "y", "prompt": "again"}, b"{broken", {"id": 3, "prompt": "3"})
    assert run_job(folder, output) == 1
    failed = {(r["file"], r["line"]): r["error"] for r in records(output) if "error" in r}
    assert list(failed) == [("b.jsonl", 2), ("b.jsonl", 3)]
    assert failed["b.jsonl", 2] == 'the id "y" is already that of a.jsonl line 3; give each line its own'
    said = capsys.readouterr().err
    assert "b.jsonl line 2: the id" in said
    assert "b.jsonl line 3: not JSON" in said


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_parquet_is_answered_as_jsonl(tmp_path, arrow, suffix):
    put(tmp_path / "in.jsonl", *ASKED)
    put_rows(tmp_path / "in.parquet", ASKED)
    for kind in (".jsonl", ".parquet"):
        assert run_job((tmp_path / "in").with_suffix(kind), tmp_path / f"from{kind}{suffix}") == 1
    made = [records(records_of(tmp_path / f"from{kind}{suffix}")) for kind in (".jsonl", ".parquet")]
    assert answers(made[0]) == answers(made[1])
    assert sorted(r["line"] for r in made[1]) == [1, 2, 3, 4, 5, 6]
    assert {r["id"] for r in made[1]} == {"a", "b", "c", "d", "e", 6}
    [refused] = [r["error"] for r in made[1] if r["id"] == "e"]
    assert refused.startswith("max_tokens must be at least 1, got 0")


def test_a_directory_of_parquet_files_is_read(tmp_path, arrow):
    folder = split(tmp_path, ASKED[:-1], write=put_rows, suffix=".parquet", at=(0, 2, 4))
    put(tmp_path / "one.jsonl", *ASKED[:-1])
    assert run_job(folder, tmp_path / "all.jsonl") == run_job(tmp_path / "one.jsonl", tmp_path / "one.out.jsonl") == 1
    assert answers(records(tmp_path / "all.jsonl")) == answers(records(tmp_path / "one.out.jsonl"))


def test_rows_are_lines_in_their_order(tmp_path, arrow):
    path = put_rows(tmp_path / "in.parquet", [{"prompt": f"{i}" if i % 3 else None, "seed": i} for i in range(1000)])
    want = [(i + 1, {"prompt": f"{i}", "seed": i} if i % 3 else {"seed": i}) for i in range(1000)]
    for _ in range(2):
        assert [(number, json.loads(data)) for number, data in rows(path)] == want


def of_row(tmp_path, arrow, **columns):
    """The first row of a file with these columns, read as a line."""
    pyarrow = pytest.importorskip("pyarrow")
    arrow.write_table(pyarrow.table(columns), tmp_path / "in.parquet")
    [(place, data), *_] = source_of(tmp_path / "in.parquet").lines()
    assert place == Place("", 1)
    return read_line(data, place.line, SamplingParams())


def test_columns_of_wrong_types_and_names_are_errors_of_their_rows(tmp_path, arrow):
    pyarrow = pytest.importorskip("pyarrow")
    for columns, error in (
        ({"prompt": ["x"], "max_tokens": ["5"]}, 'max_tokens must be a whole number, got "5"'),
        ({"prompt": ["x"], "max_tokens": [5.0]}, "max_tokens must be a whole number, got 5.0"),
        ({"prompt": [b"x"]}, """prompt must be a text, got {"bytes": "b'x'"}"""),
        ({"prompt": [7]}, "prompt must be a text, got 7"),
        ({"prompt": [None], "seed": [1]}, "no prompt: give prompt"),
        ({"prompt": ["x"], "temperature": [float("nan")]}, "NaN is no number"),
        ({"prompt": ["x"], "prompts": ["y"]}, 'unknown field "prompts"; known are'),
        ({"messages": [[{"role": "user", "content": "x", "weight": 1}]]}, 'unknown field "messages[0].weight"'),
        ({"messages": ["x"]}, 'messages must be a list with at least one message, got "x"'),
        ({"prompt": ["x"], "id": [[1]]}, "id must be a text or a number, got [1]"),
        ({"custom_id": ["c"], "body": [{"prompt": "x", "n": 0}]}, "n must be at least 1"),
        ({"prompt": pyarrow.array([b"\xff"]).cast(pyarrow.binary()).view(pyarrow.string())}, "not UTF-8: byte 0xff"),
    ):
        broken = of_row(tmp_path, arrow, **columns)
        assert isinstance(broken, Broken), columns
        assert error in broken.error


def test_nulls_are_what_is_not_given(tmp_path, arrow):
    pyarrow = pytest.importorskip("pyarrow")
    chat = [{"role": "user", "content": "x", "name": None, "weight": None}]
    job = of_row(tmp_path, arrow, messages=[chat], prompt=pyarrow.nulls(1), other=pyarrow.nulls(1), seed=[None])
    assert isinstance(job, Job)
    assert (job.id, job.messages, job.params) == (1, [{"role": "user", "content": "x"}], SamplingParams())
    body = {"messages": chat, "logit_bias": None, "max_completion_tokens": 3}
    job = of_row(tmp_path, arrow, custom_id=["c"], body=[body], method=["POST"])
    assert isinstance(job, Job)
    assert (job.id, job.params) == ("c", SamplingParams(max_tokens=3))
    biases = pyarrow.array([[("5", 1.0), ("6", 2.0)]], pyarrow.map_(pyarrow.string(), pyarrow.float64()))
    job = of_row(tmp_path, arrow, prompt=[[1, 2]], logit_bias=biases)
    assert isinstance(job, Job)
    assert (job.prompt, job.params) == ([1, 2], SamplingParams(logit_bias={5: 1.0, 6: 2.0}))


TEXTS = st.text(st.characters(codec="utf-8"), max_size=8)
LINES = st.fixed_dictionaries(
    {},
    optional={
        "id": TEXTS,
        "prompt": TEXTS,
        "messages": st.lists(
            st.fixed_dictionaries({"role": st.sampled_from(["user", "robot"])}, optional={"content": TEXTS}), max_size=2
        ),
        "max_tokens": st.integers(-1, 9),
        "temperature": st.floats(0, 2),
        "stop": st.lists(TEXTS, max_size=2),
        "stop_token_ids": st.lists(st.integers(0, 9), max_size=2),
        "logit_bias": st.dictionaries(st.sampled_from(["1", "20"]), st.floats(-9, 9), min_size=1),
        "logprobs": st.booleans(),
        "ratio": st.floats(0.5, 9),
        "compression": st.sampled_from(["none", "snapkv"]),
    },
)


@given(lines=st.lists(LINES, min_size=1, max_size=5).filter(any))
def test_jsonl_written_as_parquet_gives_the_same_jobs(tmp_path_factory, lines):
    path = put_rows(tmp_path_factory.mktemp("lines") / "in.parquet", lines)
    for line, (number, data) in zip(lines, rows(path), strict=True):
        want = read_line(json.dumps(line).encode(), number, SamplingParams())
        made = read_line(data, number, SamplingParams())
        if isinstance(want, Job):
            assert replace(made, digest=want.digest) == want
        else:
            assert isinstance(made, Broken)
            assert made.id == want.id


@pytest.mark.parametrize("spare", [1, 4096])
def test_parquet_read_back_is_the_records_in_the_inputs_order(tmp_path, arrow, monkeypatch, spare):
    monkeypatch.setattr("jaxkv.batch.parquet.MOST_ROWS", spare)
    source, output = put(tmp_path / "in.jsonl", *ASKED, {"id": "\ud800", "prompt": "x"}), tmp_path / "out.parquet"
    assert run_job(source, output, settings={"model": "m"}) == 1
    written = sorted(records(records_of(output)), key=lambda r: r["line"])
    table = arrow.read_table(output)
    assert table.column_names[:5] == ["id", "file", "line", "text", "error"]
    for record, row in zip(written, table.to_pylist(), strict=True):
        for name, value in record.items():
            if name in ("id", "settings") and not isinstance(value, str):
                assert json.loads(row.pop(name)) == value
            else:
                assert row.pop(name) == ("\\ud800" if value == "\ud800" else value)
        assert set(row.values()) == {None}
    assert arrow.ParquetFile(output).metadata.num_row_groups == (7 if spare == 1 else 1)
    pandas = pytest.importorskip("pandas")
    frame = pandas.read_parquet(output)
    assert frame[frame.error.isna()].text.tolist() == [r["text"] for r in written if "text" in r]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("slash", [True, False])
def test_directory_in_and_directory_out(tmp_path, suffix, slash):
    write = put_rows if suffix == ".parquet" else put
    folder, into = split(tmp_path, ASKED[:-1], at=(0, 2, 4), write=write, suffix=suffix), tmp_path / "out"
    put(folder / "part-3.jsonl") if write is put else put_rows(folder / "part-3.parquet", ASKED[-1:])
    if not slash:
        into.mkdir()
    for _ in range(2):
        assert run_job(folder, f"{into}/" if slash else into) == 1
    names = [f"part-{i}{suffix}" for i in range(4)]
    assert sorted(path.name for path in into.iterdir()) == names
    made = (
        [pytest.importorskip("pyarrow.parquet").read_table(into / name).to_pylist() for name in names]
        if (write is put_rows)
        else [records(into / name) for name in names]
    )
    assert [[r["id"] for r in each] for each in made[:3]] == [["a", "b"], ["c", "d"], ["e"]]
    assert all(r["file"] == name for name, each in zip(names, made, strict=True) for r in each)
    if write is put:
        assert made[3] == []
        together = sorted((into / name).read_bytes() for name in names[:3])
        assert sorted(b"".join(together).splitlines()) == sorted(records_of(into).read_bytes().splitlines())


def test_a_line_that_was_mended_is_in_the_file_after_it_was_tried_again(tmp_path, arrow):
    source, output = put(tmp_path / "in.jsonl", {"prompt": "too long"}, {"prompt": "b"}), tmp_path / "out.parquet"
    assert run_job(source, output) == 1
    put(source, {"prompt": "a"}, {"prompt": "b"})
    assert arrow.read_table(output)["error"].to_pylist() == ["prompt is too long", None]
    assert run_job(source, output, retry_failed=True) == 0
    assert arrow.read_table(output)["error"].to_pylist() == [None, None]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "in.jsonl",
        "out.parquet",
        "out.parquet.records.jsonl",
    ]


@pytest.mark.parametrize("way", ["parquet to parquet", "directory to directory"])
def test_a_job_killed_ten_times_equals_one_left_alone(tmp_path, way):
    lines = [json.loads(line) for line in many(tmp_path).read_bytes().splitlines()]
    for i in (30, 70, 110):
        lines[i]["prompt"] = "too long"
    lines[-1] = lines[0]
    output, alone = tmp_path / "out.parquet", tmp_path / "alone.parquet"
    if way == "directory to directory":
        source, output, alone = split(tmp_path, lines, at=(0, 40, 150)), tmp_path / "out", tmp_path / "alone"
        output.mkdir()
        alone.mkdir()
    else:
        source = put_rows(tmp_path / "in.parquet", lines)
    assert run_job(source, alone) == 1
    done = start("kills", source, output, pause=0.004, number=1)
    out, errors = done.communicate(timeout=60)
    ends = [tuple(map(int, line.split())) for line in out.splitlines()]
    assert [status for status, _ in ends] == [-signal.SIGKILL] * 10 + [1], errors
    assert len({count for _, count in ends if 0 < count < 200}) >= 4, f"killed too early or too late: {ends}"
    made = [records(records_of(each)) for each in (output, alone)]
    assert len(made[0]) == 200
    assert sorted(map(json.dumps, made[0])) == sorted(map(json.dumps, made[1]))
    for path in [output, *output.iterdir()] if output.is_dir() else [output]:
        assert path.is_dir() or path.read_bytes() == (alone / path.relative_to(output)).read_bytes()


def test_workers_write_what_one_engine_would(tmp_path, arrow):
    lines = [{"id": f"q{i}", "prompt": f"question {i}", "seed": i} for i in range(30)]
    folder = split(tmp_path, lines, at=(0, 11, 20), write=put_rows, suffix=".parquet")
    assert run_job(folder, tmp_path / "one.parquet") == 0
    assert run_with_workers(folder, tmp_path / "two.parquet", count=2, pause=0.002) == 0
    assert (tmp_path / "one.parquet").read_bytes() == (tmp_path / "two.parquet").read_bytes()


def test_a_file_that_cannot_be_written_stays_as_it_was_and_the_same_command_makes_it(tmp_path, arrow, monkeypatch):
    source, output = many(tmp_path, 6), tmp_path / "out.parquet"
    assert run_job(put(source, *source.read_bytes().splitlines()[:4]), output) == 0
    before = output.read_bytes()
    many(tmp_path, 6)

    def full(*_):
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match=r"can't write .*out\.parquet: No space left .* all records are in .*start"):
            run_job(source, output)
    assert output.read_bytes() == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    with BatchJob(source, output, SamplingParams()) as job:
        assert (job.left, job.finish()) == (0, 0)
    assert arrow.read_table(output)["id"].to_pylist() == [f"q{i}" for i in range(6)]


def test_a_job_that_is_stopped_leaves_no_file_of_a_part(tmp_path, arrow):
    source, output = many(tmp_path), tmp_path / "out.parquet"
    process = start("run", source, output, 0.02, 0)
    deadline = time.monotonic() + 30
    while not (records_of(output).exists() and records_of(output).stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert 0 < len(records(records_of(output))) < 200
    assert not output.exists()
    assert run_job(source, output) == 0
    assert arrow.read_table(output).num_rows == 200


def test_inputs_that_cannot_be_read_are_refused(tmp_path, arrow):
    folder, output = tmp_path / "in", tmp_path / "out.jsonl"
    folder.mkdir()
    with pytest.raises(ValueError, match=r"in holds no file whose name ends in \.jsonl or \.parquet"):
        run_job(folder, output)
    put(folder / "a.jsonl", {"prompt": "x"})
    whole = put_rows(folder / "b.parquet", [{"prompt": f"{i}" * 99} for i in range(999)]).read_bytes()
    with pytest.raises(ValueError, match=r"two kinds, such as a\.jsonl and b\.parquet"):
        run_job(folder, output)
    (folder / "a.jsonl").unlink()
    for damaged, said in (
        (b"", "after row 0: no Parquet file"),
        (b"{}", "after row 0: no Parquet file"),
        (whole[: len(whole) // 2], "after row 0: no Parquet file"),
        (whole[:60] + bytes(40) + whole[100:], "after row 0: no Parquet file, or a damaged one"),
    ):
        (folder / "b.parquet").write_bytes(damaged)
        with pytest.raises(ValueError, match=said) as error:
            run_job(folder, output)
        assert "b.parquet" in str(error.value)
        assert not records(output)
    (folder / "b.parquet").unlink()
    (folder / "b.parquet").mkdir()
    with pytest.raises(OSError, match=r"b\.parquet: it must be a regular file"):
        run_job(folder, output)


def test_outputs_that_would_harm_something_are_refused(tmp_path, arrow):
    source, folder = many(tmp_path, 3), split(tmp_path, ASKED, at=(0, 1, 2))
    (tmp_path / "there.parquet").write_bytes(b"precious")
    (tmp_path / "there").mkdir()
    put(tmp_path / "there" / "part-1.jsonl", {"precious": 1})
    (tmp_path / "link").symlink_to(folder)
    inputs = {path: path.read_bytes() for path in folder.iterdir()}
    for given_, output, error in (
        (folder, folder / "out.jsonl", "would be among the input"),
        (folder, folder / "out.parquet", "would be among the input"),
        (folder, f"{folder}/sub/", "would be among the input"),
        (folder, folder, "are the same file"),
        (folder, tmp_path / "link", "are the same file"),
        (folder, tmp_path / "there.parquet", r"there\.parquet is there, but not .*there\.parquet\.records\.jsonl"),
        (folder, tmp_path / "there", r"part-1\.jsonl is there, but not .*there\.records\.jsonl"),
        (source, f"{tmp_path}/new/", "Is a directory, and the input one file"),
        (source, tmp_path / "no" / "out.parquet", "can't write"),
        (folder, f"{tmp_path}/no/new/", "can't write"),
    ):
        with pytest.raises((ValueError, OSError), match=error):
            run_job(given_, output)
    with pytest.raises(ValueError, match="--output-format openai is JSONL, not Parquet; give another --output"):
        run_job(source, tmp_path / "out.parquet", output_format="openai")
    assert inputs == {path: path.read_bytes() for path in folder.iterdir()}
    assert (tmp_path / "there.parquet").read_bytes() == b"precious"
    assert not list(tmp_path.glob("*.records.jsonl"))


def test_without_pyarrow_it_is_named(tmp_path, monkeypatch, capsys):
    real = builtins.__import__

    def missing(name, *rest):
        if name.partition(".")[0] == "pyarrow":
            raise ModuleNotFoundError("No module named 'pyarrow'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    source = many(tmp_path, 3)
    (tmp_path / "in.parquet").write_bytes(b"")
    for given_, output in ((source, "out.parquet"), (tmp_path / "in.parquet", "out.jsonl")):
        files = ["--input", str(given_), "--output", str(tmp_path / output)]
        assert main(["batch", "--model", "m", *files]) == 2
        assert "Parquet files need pyarrow: pip install 'jaxkv[parquet]'" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "in.parquet"]
    assert run_job(source, tmp_path / "out.jsonl") == 0
