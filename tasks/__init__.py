"""seqio tasks: one module per corpus.

* `python_docs`: the embedded default, Python's own documentation.
* `text_files`: the user's text files, found by globs.
* `json_lines`: the user's JSON lines, also compressed by gzip.
* `parquet`: the user's Parquet files.
* `tfds_text`: datasets of TFDS that are on disk: wikipedia, c4, others of text.
* `raw_text`: what all share; start here to write another task.
* `found_files`, `dividing`, `tables`: globs; splits and users; rows of fields.
"""
