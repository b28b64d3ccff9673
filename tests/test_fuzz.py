"""Bounded runs of the fuzzers; the long ones are `python tests/tools/fuzz.py` and `fuzz_built.py`."""

import re

import fuzz

KINDS = {"bytes_level", "zip_records", "zip_pickle", "zip_entries", "pickle_level", "header_level"}


def test_mutants_are_refused_or_converted(files, tmp_path):
    for path in files.glob("tiny*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    outcomes, slowest, failures = fuzz.fuzz(fuzz.corpus(tmp_path), count=2000, seed="test")
    assert failures == []
    assert sum(outcomes.values()) == 2000
    assert slowest < fuzz.SECONDS
    assert sum(number for outcome, number in outcomes.items() if "refused" in outcome) > 1000
    assert sum(number for outcome, number in outcomes.items() if "same values" in outcome) > 50
    for kind in KINDS:  # each has happened, and was refused
        assert outcomes[f"{kind}: refused"] > 10, kind
    assert {outcome.split(": ")[0] for outcome in outcomes} == KINDS


def test_built_files_are_read_or_refused(run):
    """It exits 1 if a kind of file was never built."""
    done = run("tests/tools/fuzz_built.py", "--count", 800, "--seed", "test")
    assert done.returncode == 0, done.stdout + done.stderr
    counted = {outcome: int(number.replace(",", "")) for number, outcome in re.findall(r"([\d,]+)  (.+)", done.stdout)}
    assert counted["safetensors: both read it"] > 50 and counted["safetensors: neither reads it"] > 50
    # We look for less than it in keys that nobody knows, and for more in names and metadata.
    assert counted.get("safetensors: only we read it", 0) < 10
    assert counted.get("safetensors: only safetensors reads it", 0) < 30
