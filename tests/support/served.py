"""What a started `preskip serve --json` prints once it answers."""

import subprocess


def first_document(served: subprocess.Popen[str]) -> str:
    """The JSON document that it prints, up to the line that closes it; the test fails where the process ends before."""
    assert served.stdout is not None
    lines = []
    for line in served.stdout:
        lines.append(line)
        if line == "}\n":
            return "".join(lines)
    raise AssertionError(f"it ended with {served.wait()}: {''.join(lines)}")
