"""`python -m preskip`."""

from preskip.cli.main import main

main()
