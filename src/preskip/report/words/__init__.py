"""What a run says, in words: claims, verdicts, the frontier, what was run on what."""
