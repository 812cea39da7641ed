"""What `preskip explain` measured: its page, and its section of the report."""
