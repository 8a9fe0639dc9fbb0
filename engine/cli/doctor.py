"""`engine doctor`."""

from __future__ import annotations

from dataclasses import dataclass

import tyro

from engine.cli.common import single_process
from engine.errors import EXIT_ERROR, EXIT_OK, ConfigError, FieldError


@dataclass
class DoctorOptions:
    """Say what this installation and machine are, try each op against float64 and gloo between two processes.

    Exit code 0 when nothing is broken (what is merely not there is told), 1 with the faults listed last.
    """

    timeout_s: float = 60.0
    """seconds that the two processes may take to start and to sum a number over gloo"""


def run(args: list[str]) -> int:
    """Run the verb; returns the exit code."""

    o = tyro.cli(DoctorOptions, args=args, prog="engine doctor")
    if o.timeout_s <= 0:
        raise ConfigError(
            [
                FieldError(
                    "cli.not-above-zero", "--timeout-s", o.timeout_s, "is no time to wait", "Use a number above 0."
                )
            ]
        )
    single_process("doctor")
    from engine.cli.diagnosis import examine  # loads torch: faults are told before

    errors = []
    for finding in examine(o.timeout_s):
        print(f"{finding.topic:<16} {finding.text}", flush=True)  # at once: the next may end the process
        errors += [finding] if finding.broken else []
    if not errors:
        print("nothing is broken")
        return EXIT_OK
    print("broken:")
    for finding in errors:
        print(f"  {finding.topic}: {finding.text}")
    return EXIT_ERROR
