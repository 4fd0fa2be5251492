"""The command line, one file for each command: its arguments and its run.

In: arguments. Out: data on standard output, all else on standard error, and an exit status.
"""
