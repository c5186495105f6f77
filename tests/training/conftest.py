import pytest
import toy_run


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The config of a run so small that a step takes milliseconds."""
    return toy_run.write(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def whole(toy, request):
    """A run with the test file's SETTINGS that nothing interrupts."""
    run = toy.parent / "whole"
    toy_run.run(toy, f"run={run}", *request.module.SETTINGS)
    return run
