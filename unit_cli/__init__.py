"""The command `unit`: one file per sub-command, each with `add_parser(subparsers)` and `run(args) -> exit status`."""
