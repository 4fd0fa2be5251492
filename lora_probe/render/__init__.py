"""What people and programs see: one file per output format, in `formats.py` the registry of all of them.

In: a command's result. Out: text for a terminal (`text/`), JSON (`json/`), SARIF, GitHub annotations, Markdown.
"""
