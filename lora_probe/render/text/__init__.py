"""Text for people, one file per command; what several commands share is in `ledger.py`.

In: a command's result. Out: rich renderables. Colour never carries meaning alone: every cell is a number or a word
first, so that NO_COLOR loses nothing.
"""
