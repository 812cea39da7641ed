"""What a worker process imports before it is set up."""

import subprocess
import sys


def test_what_sets_a_worker_up_imports_no_library():
    """Else their notices come before they are kept away."""
    code = "import preskip.experiment.worker, sys; print({'torch', 'transformers'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
