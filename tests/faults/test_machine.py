"""Random faults in random orders: nothing acknowledged is lost, and nothing sticks. See `machine`."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, configuration, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.faults.machine import FaultMachine, Worlds

PARTS = 4  # tests that share the examples, so that pytest-xdist runs them at the same time: most of it is waiting
EXAMPLES = int(os.environ.get("FAULT_EXAMPLES", "200"))  # of all parts together
STEPS = int(os.environ.get("FAULT_STEPS", "8"))  # the most steps of an example
# From the eleventh example of a run on, hypothesis mostly repeats parts of earlier ones, here the cheapest faults.
RUN = 10
# An example lasts seconds, so shrinking one takes an hour. Its steps in the failure say what happened.
PHASES = (Phase.generate, *([Phase.shrink] if os.environ.get("FAULT_SHRINK") else []))


def run_machine(directory: Path, examples: int, steps: int) -> None:
    """Runs the machine, in worlds below `directory`."""
    configuration.set_hypothesis_home_dir(directory / "hypothesis")
    worlds = Worlds(directory)

    class Machine(FaultMachine):
        def __init__(self) -> None:
            super().__init__(worlds)

    try:
        for start in range(0, examples, RUN):
            run_state_machine_as_test(
                Machine,
                settings=settings(
                    max_examples=min(RUN, examples - start),
                    stateful_step_count=steps,
                    deadline=None,
                    database=None,
                    print_blob=True,
                    report_multiple_bugs=False,
                    phases=PHASES,
                    suppress_health_check=list(HealthCheck),
                ),
            )
    finally:
        worlds.close()


def test_a_few_random_faults(tmp_path: Path) -> None:
    """Ten short examples, for the fast suite."""
    run_machine(tmp_path, 10, 5)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_random_faults(tmp_path: Path, part: int) -> None:
    """FAULT_EXAMPLES examples in all, 200 without that variable."""
    run_machine(tmp_path, EXAMPLES // PARTS, STEPS)
