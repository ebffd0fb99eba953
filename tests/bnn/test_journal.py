"""The journal: what survives an end at any byte, and what it refuses."""

import json

import pytest

from bnn import CheckpointError
from bnn.journal import Journal

SETTINGS = {"method": "NUTS()", "draws": 3, "rows": (1, 2)}


def filled(path, count=3):
    journal = Journal(path, SETTINGS)
    for i in range(count):
        journal.add({"i": i, "settings": "of a result", "value": 0.1 * i})
    return journal


def test_what_was_added_is_found_again(tmp_path):
    written = filled(tmp_path / "new" / "run.jsonl")
    read = Journal(written.path, SETTINGS)
    assert [each["i"] for each in read.results] == [0, 1, 2]
    assert read.results == written.results
    assert read.results[2]["value"] == 0.2
    read.add({"i": 3})
    assert [each["i"] for each in Journal(written.path, SETTINGS).results] == [0, 1, 2, 3]


def test_an_end_at_any_byte_costs_one_line(tmp_path):
    path = tmp_path / "run.jsonl"
    whole = filled(path).path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        kept = max(sum(e - 1 <= end for e in ends) - 1, 0)  # whole lines, their newline or not
        journal = Journal(path, SETTINGS)
        assert [each["i"] for each in journal.results] == list(range(kept)), end
        journal.add({"i": 9})
        assert [each["i"] for each in Journal(path, SETTINGS).results] == [*range(kept), 9], end


def test_nothing_is_written_before_the_first_result(tmp_path):
    assert Journal(tmp_path / "run.jsonl", SETTINGS).results == []
    assert not (tmp_path / "run.jsonl").exists()


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"method": "MAP()", "draws": 3, "rows": [1, 2]}, r"its method is 'NUTS\(\)' and now"),
        ({"method": "NUTS()", "rows": [1, 2]}, "its draws is 3 and now it is None"),
        ({"method": "NUTS()", "draws": 3, "rows": [1]}, r"its rows is \[1, 2\]"),
        (SETTINGS | {"more": 1}, "its more is None and now it is 1"),
    ],
)
def test_another_run_is_refused(settings, match, tmp_path):
    path = filled(tmp_path / "run.jsonl").path
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=match):
        Journal(path, settings)
    assert path.read_bytes() == before


def test_lines_of_two_runs_are_refused(tmp_path):
    path = filled(tmp_path / "run.jsonl").path
    with path.open("a") as file:
        file.write(json.dumps({"run": "0" * 16, "i": 7}) + "\n")
    with pytest.raises(CheckpointError, match="a line of another run"):
        Journal(path, SETTINGS)


@pytest.mark.parametrize(
    "text", ['{"a": 1}\n', "hello", "x,y\n1,2\n", "[1]\n[2]\n", '{"settings": 3}\n']
)
def test_a_file_of_something_else_is_refused(text, tmp_path):
    path = tmp_path / "data"
    path.write_text(text)
    with pytest.raises(CheckpointError, match="path of its own"):
        Journal(path, SETTINGS)
    assert path.read_text() == text


def test_a_place_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="Cannot"):
        filled(tmp_path / "file" / "run.jsonl")
