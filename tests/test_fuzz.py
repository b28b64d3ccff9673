"""Bounded runs of the fuzzers; the long ones are `python tests/tools/fuzz.py`, `fuzz_built.py`, `fuzz_coverage.py`."""

import re

import pytest

import fuzz
import fuzz_coverage

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


@pytest.mark.parametrize("reader", fuzz_coverage.READERS)
def test_the_corpus_is_read_or_refused(tmp_path, reader):
    """Files to begin with, and those that ever did harm."""
    files = sorted((fuzz_coverage.CORPUS / reader).iterdir())
    assert files
    for file in files:
        fuzz_coverage.attempt(fuzz_coverage.READERS[reader], tmp_path / "x", file.read_bytes())


@pytest.mark.parametrize("reader", fuzz_coverage.READERS)
def test_what_coverage_leads_to_is_read_or_refused(run, reader):
    pytest.importorskip("atheris", reason="atheris is not installed; it has wheels for Linux with Python 3.11 to 3.13")
    done = run("-W", "ignore", "tests/tools/fuzz_coverage.py", reader, "--count", 1000)
    assert done.returncode == 0 and "Done 1000 runs" in done.stderr, done.stdout[-1000:] + done.stderr[-3000:]
