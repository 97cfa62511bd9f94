"""docs/faults.md and the tests agree: a test names the faults that it shows, and the document names the tests."""

import re

from paths import ROOT

NO_TEST = "*no test yet*"


def cited():
    """Returns fault number -> the names of the tests that cite it: test_fault_017_… or test_fault_043_044_…"""
    tests = {}
    for path in (ROOT / "tests").rglob("test_*.py"):
        source = path.read_text(encoding="utf-8")
        for name, numbers in re.findall(r"^def (test_fault((?:_\d{3})+)_\w+)", source, re.MULTILINE):
            for number in numbers.split("_")[1:]:
                tests.setdefault(int(number), set()).add(name)
    return tests


def documented():
    """Returns fault number -> what the document lists below it: names of tests or NO_TEST."""
    faults = {}
    for line in (ROOT / "docs/faults.md").read_text(encoding="utf-8").splitlines():
        if found := re.match(r"(\d+)\. ", line):
            names = faults[int(found[1])] = set()
        elif found := re.match(r"    - (.*)", line):
            names.add(found[1].strip("`"))
    return faults


def test_every_fault_that_a_test_cites_is_in_the_document():
    assert cited().keys() <= documented().keys()


def test_every_test_that_the_document_names_exists_and_cites_that_fault():
    tests = cited()
    wrong = {number: names - tests.get(number, set()) - {NO_TEST} for number, names in documented().items()}
    assert not {number: names for number, names in wrong.items() if names}


def test_the_document_says_no_test_yet_exactly_where_no_test_cites_the_fault():
    faults = documented()
    untested = {number for number, names in faults.items() if NO_TEST in names}
    assert untested == faults.keys() - cited().keys()


def test_the_search_for_names_sees_them():
    assert len(cited()) > 50
    assert len(documented()) == max(documented())
