"""`engine doctor`."""

from __future__ import annotations

from dataclasses import dataclass

from engine.cli.common import Help, parse, single_process
from engine.errors import EXIT_ERROR, EXIT_OK, ConfigError, FieldError


@dataclass
class DoctorOptions:
    """Report versions, devices and kernels of this installation, and test them.

    Checks each op against float64 and sums a number between two processes. The exit code is 0 if nothing is broken
    (missing optional packages are only reported), else 1 with the errors listed last.
    """

    timeout_s: float = 60.0
    """seconds that the two processes may take to start and to sum a number over gloo; raise it on a slow machine"""


HELP = Help(
    examples=(
        ("Check this installation", "engine doctor"),
        ("Allow the two gloo processes five minutes on a slow machine", "engine doctor --timeout-s 300"),
    ),
)


def run(args: list[str]) -> int:
    """Run the command; returns the exit code."""

    o = parse(DoctorOptions, args, "doctor", HELP)
    if o.timeout_s <= 0:
        raise ConfigError(
            [
                FieldError(
                    "cli.not-above-zero", "--timeout-s", o.timeout_s, "is not above 0", "Give seconds, such as 60."
                )
            ]
        )
    single_process("doctor")
    from engine.cli.diagnosis import examine  # loads torch, so option errors are reported first

    errors = []
    for finding in examine(o.timeout_s):
        print(f"{finding.topic:<16} {finding.text}", flush=True)  # immediately: the next check may crash the process
        errors += [finding] if finding.broken else []
    if not errors:
        print("nothing is broken")
        return EXIT_OK
    print("broken:")
    for finding in errors:
        print(f"  {finding.topic}: {finding.text}")
    return EXIT_ERROR
