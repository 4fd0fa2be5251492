"""The command line. Each command has one file with its arguments and its run; `main.py` lists them, `options.py` has
the arguments that several share.

In: arguments. Out: data on standard output, all else on standard error, and an exit status.
"""
