"""`python -m tokenmill.cli`, for where the console command is not on the path."""

from tokenmill.cli.main import main

main()
