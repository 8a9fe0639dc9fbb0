"""Create a separate environment for the peers: a venv that uses the running interpreter's torch.

    python tools/bench/peers_env.py build/bench-peers

Peers are installed with --no-deps, so none can install another torch; their other requirements are in peers.txt, or
come from the running interpreter by a .pth file. So both sides run the same torch and transformers.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PINS = Path(__file__).with_name("peers.txt")


def python_of(folder: Path) -> tuple[Path | None, str]:
    """(interpreter with the peers, "") or (None, reason). Installs the peers on first use."""
    python, marker = folder / "bin/python", folder / "installed.txt"
    wanted = "\n".join([sys.executable, sys.version, PINS.read_text(encoding="utf-8")])
    if marker.exists() and marker.read_text(encoding="utf-8") == wanted:
        return python, ""
    print(f"installing the peers into {folder} (once)", file=sys.stderr, flush=True)
    borrowed = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    site = folder / f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
    commands = [
        [sys.executable, "-m", "venv", "--clear", str(folder)],
        [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps", "-r", str(PINS)],
    ]
    for command in commands:
        done = subprocess.run(command, capture_output=True, encoding="utf-8")
        if done.returncode:
            output = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
            errors = [line for line in output if line.startswith("ERROR")] or output[-1:]
            return None, f"peers cannot be installed: {errors[0] if errors else 'no message'}"
    (site / "borrowed.pth").write_text("\n".join(borrowed) + "\n", encoding="utf-8")
    marker.write_text(wanted, encoding="utf-8")
    return python, ""


if __name__ == "__main__":
    found, why = python_of(Path(sys.argv[1]))
    if found is None:
        sys.exit(why)
    print(found)
