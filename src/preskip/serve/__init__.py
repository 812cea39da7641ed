"""Serving: the plug-in for vLLM, the server that `preskip serve` starts, and the check that the branch runs in it."""
