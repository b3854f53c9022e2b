"""scripts/plot_results.py: what is drawn, and files that aren't results."""

import json

import pytest
from plot_results import main


def record(policy, ratio, task, accuracy):
    near = {"low": accuracy - 0.1, "high": accuracy + 0.1}
    return {"policy": policy, "ratio": ratio, "task": task, "accuracy": accuracy, "bytes_full": 1 << 20} | near


def held(r):
    return r | {"bytes_held": int(r["bytes_full"] / r["ratio"])}


OURS = [held(record("none", 1, task, 0.8)) for task in ("words", "numbers")]
OURS += [held(record("auto", ratio, task, 0.7)) for ratio in (4, 8) for task in ("words", "numbers")]
THEIRS = [held(record("kvpress KVzip", ratio, "words", 0.5)) for ratio in (4, 8)]


def test_results_of_several_files_are_drawn_together(tmp_path):
    for name, records in ("ours", OURS), ("theirs", THEIRS):
        (tmp_path / name).write_text(json.dumps(records))
    output = tmp_path / "all.svg"
    files = [str(tmp_path / name) for name in ("ours", "theirs")]
    assert main([*files, "--output", str(output)]) == 0
    drawn = output.read_text()
    for text in ("words", "numbers", "auto", "kvpress KVzip", "full cache", "MB held, mean"):
        assert f"<!-- {text} -->" in drawn
    assert main([*files, "--only", "numbers", "--output", str(output)]) == 0
    drawn = output.read_text()
    assert "<!-- words -->" not in drawn
    assert "<!-- kvpress KVzip -->" not in drawn


@pytest.mark.parametrize(
    ("content", "options", "said"),
    [
        ("{", (), "is not JSON"),
        ("{}", (), "must hold a list of records"),
        (json.dumps([OURS[0], {"policy": "none"}]), (), "must hold a list of records"),
        (json.dumps(OURS), ("--only", "letters"), "no record to draw"),
    ],
)
def test_what_cannot_be_drawn_is_told(tmp_path, capsys, content, options, said):
    path = tmp_path / "out.json"
    path.write_text(content)
    assert main([str(path), "--output", str(tmp_path / "x.png"), *options]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()
