"""The server answers as its own OpenAPI schema says, whatever it is sent."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

schemathesis = pytest.importorskip("schemathesis", reason="the server needs the extra test")

FEW = settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
MANY = settings(FEW, max_examples=200, derandomize=False)


@pytest.fixture(scope="module")
def api(client, pictures):
    """The schema; some of the files that are sent are pictures."""
    found = [path.read_bytes() for path in pictures.values()]
    schemathesis.openapi.format("binary", st.sampled_from([*found, b"", b"no picture"]))
    return schemathesis.openapi.from_url(f"{client.base_url}/openapi.json")


def check_all(api, how: settings) -> None:
    for found in api.get_all_operations():

        @how
        @given(case=found.ok().as_strategy())
        def check(case):
            # what the schema cannot say: settings that contradict each other, pictures that do not fit
            case.call_and_validate(excluded_checks=[schemathesis.checks.positive_data_acceptance])

        check()


@pytest.mark.slow
def test_answers_are_as_the_schema_says(api):
    check_all(api, FEW)


@pytest.mark.slow
def test_many_answers_are_as_the_schema_says(api):
    check_all(api, MANY)
