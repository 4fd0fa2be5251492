"""The document of each result: one file per command.

In: a command's result. Out: a `Document`, from which pages, Markdown and tables are made. Texts and cells are those of
`render/text`, so that a page and a terminal never differ.
"""
