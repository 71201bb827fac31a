"""seqio tasks: one module per corpus.

* `python_docs`: the embedded default, Python's own documentation.
* `text_files`: the user's text files, found by globs.
* `raw_text`: what both share; start here to write another task.
"""
