"""What people and programs see, one file for each format.

In: the types of the core. Out: text for a terminal (`text/`), JSON, SARIF, GitHub's annotations, Markdown.
"""
